"""Code of this machine: digests of the source of a backend's import path and of its local directories.

Nothing is imported. A deployment compares the digests with those of the record, to find code that has changed under the
same name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from ...broker.registry.records import BackendRecord
from ...workers.asgi.application import AsgiApplication
from ...workers.runtime_env import PY_MODULES, WORKING_DIR, pack


class Source(NamedTuple):
    """The source of a module."""

    path: Path
    """Its file, or the directory of the package that contains it."""
    digest: str


class LocalCode(NamedTuple):
    """The local copy of the code of a deployed backend."""

    module: str
    """The module of its import path."""
    source: Source | None
    """None if the module is not found here."""
    folders: tuple[str, ...]
    """The fields of ``runtime_env`` that name directories."""
    files: str
    """The digest of the archive that holds these directories; empty if there are none."""

    def changes(self, record: BackendRecord) -> list[str]:
        """Return the differences from the deployed version."""
        changes: list[str] = []
        if self.folders and self.files != record.files:
            changes.append(f"files of {' and '.join(self.folders)}")
        if self.source is not None and record.source and self.source.digest != record.source:
            changes.append(f"source of {self.module}")
        return changes

    def compared(self, record: BackendRecord) -> str:
        """Return in words which parts `changes` compared, and which it could not."""
        done = ["the declaration", *(f"the files of {folder}" for folder in self.folders)]
        if self.source is None:
            undone = f"module {self.module!r} is not found here"
        elif not record.source:
            undone = f"the source of {self.module} was not known where it was deployed"
        else:
            done.append(f"the source of {self.module} ({self.source.path})")
            undone = ""
        hint = f"; {undone}, so its source was not compared: --restart {record.tag} replaces the replicas"
        return ", ".join(done) + (hint if undone else "")


def local_code(target: str, runtime_env: Mapping[str, Any] | None, record: BackendRecord) -> LocalCode:
    """Return what this machine has of the code that would replace ``record``. Raises `ConfigError`: see `pack`."""
    environment = runtime_env or {}
    packed = pack(environment, record.version)
    folders = tuple(name for name in (WORKING_DIR, PY_MODULES) if environment.get(name)) if packed else ()
    digest = hashlib.sha256(packed).hexdigest() if packed else ""
    return LocalCode(target.partition(":")[0], find_source(target, runtime_env), folders, digest)


def source_digest(target: Callable[..., Any] | AsgiApplication | str, runtime_env: Mapping[str, Any] | None) -> str:
    """Return the digest of an import path's source; empty if it is not found here, or is an object."""
    path: Any = target.target if isinstance(target, AsgiApplication) else target
    source = find_source(path, runtime_env) if isinstance(path, str) else None
    return "" if source is None else source.digest


def find_source(target: str, runtime_env: Mapping[str, Any] | None) -> Source | None:
    """Return the source of the module of ``"package.module:Name"``, or None.

    It is looked for in the directories of ``runtime_env``, in the current directory, and where this process imports
    from. The digest is that of the module's file, or of all Python files of its outermost package. A package without an
    ``__init__.py`` counts as a directory: it may be that of a whole project.
    """
    parts = target.partition(":")[0].split(".")
    importlib.invalidate_caches()
    path: list[str] | None = list(_search_path(runtime_env or {}))
    outermost: ModuleSpec | None = None
    for number in range(len(parts)):
        # By its last name, as a namespace package would look for its parent among the modules that are loaded.
        spec = None if path is None else PathFinder.find_spec(parts[number], path)
        if spec is None:
            return None
        if outermost is None and spec.origin is not None:
            outermost = spec
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if outermost is None:
        return None
    try:
        if (folders := outermost.submodule_search_locations) is not None:
            roots = [Path(folder) for folder in folders]
            return Source(roots[0], _digest([(file, root) for root in roots for file in root.rglob("*.py")]))
        if outermost.origin is not None and (file := Path(outermost.origin)).is_file():
            return Source(file, _digest([(file, file.parent)]))
    except (OSError, IndexError):
        pass  # it cannot be read, or is not in files
    return None


def _search_path(runtime_env: Mapping[str, Any]) -> Iterator[str]:
    if working_dir := runtime_env.get(WORKING_DIR):
        yield os.path.abspath(working_dir)
    for module in runtime_env.get(PY_MODULES) or ():
        yield os.path.dirname(os.path.abspath(module))
    yield os.getcwd()
    yield from sys.path


def _digest(files: list[tuple[Path, Path]]) -> str:
    digest = hashlib.sha256()
    for file, root in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
