"""Local directories of a ``runtime_env``: packed by the call that creates a backend, unpacked by its replicas.

Ray accepts local directories for a whole job only, not for an actor. So they are stored in the registry, beside the
code that imports from them. A replica finds them on any node, and however long after the call it starts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from ..broker.errors import ConfigError, PenstockError

MAX_BYTES = 128 * 1024 * 1024
"""Most bytes of files in one ``runtime_env``: the registry and the controller's backup of it hold them."""

WORKING_DIR, PY_MODULES, EXCLUDES = "working_dir", "py_modules", "excludes"

_NEVER = (".git", ".venv", "venv", "__pycache__")
"""Folders that are always left out, as Ray does."""
_IGNORE_FILES = (".gitignore", ".rayignore")

_PREFIX = "penstock-code-"
"""Prefix of the directories of replicas. The lock on one shows that its replica is alive."""

Excluded = Callable[[Path], bool]


def for_ray(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``runtime_env`` without the local directories, for Ray."""
    left = {name: value for name, value in runtime_env.items() if name not in (WORKING_DIR, PY_MODULES, EXCLUDES)}
    if (working_dir := runtime_env.get(WORKING_DIR)) is not None and not _is_local(working_dir):
        left[WORKING_DIR] = working_dir
    if modules := [module for module in runtime_env.get(PY_MODULES) or () if not _is_local(module)]:
        left[PY_MODULES] = modules
    return left


def pack(runtime_env: Mapping[str, Any], version: str) -> bytes:
    """Return the local directories as one zip archive; empty if there are none.

    Files that ``excludes``, ``.gitignore`` and ``.rayignore`` name are left out, as Ray does. The same files give the
    same bytes except for ``version``. That gives each version of a backend a digest of its own, so that deleting one
    does not delete the files of another.

    Raises:
        ConfigError: one is not a directory or cannot be read, or they hold more than `MAX_BYTES`.
    """
    excludes = cast("list[str]", runtime_env.get(EXCLUDES) or [])
    folders: list[tuple[str, str, Path]] = []
    if (working_dir := runtime_env.get(WORKING_DIR)) is not None and _is_local(working_dir):
        folders.append((WORKING_DIR, WORKING_DIR, _directory(WORKING_DIR, working_dir)))
    for number, module in enumerate(runtime_env.get(PY_MODULES) or ()):
        if _is_local(module):
            folder = _directory(PY_MODULES, module)
            # A module is imported by the name of its directory.
            folders.append((PY_MODULES, f"{PY_MODULES}/{number}/{folder.name}", folder))
    if not folders:
        return b""
    try:
        members = [
            (f"{prefix}/{path.relative_to(folder).as_posix()}", path)
            for _, prefix, folder in folders
            for path in _walk(folder, [_matcher(folder, (*_NEVER, *excludes))], ())
        ]
        files = [path.stat().st_size for _, path in members if not path.is_dir()]
        if sum(files) > MAX_BYTES:
            named = " and ".join(f"{kind} {str(folder)!r}" for kind, _, folder in folders)
            raise ConfigError(
                f"runtime_env: {named} have {sum(files) / 2**20:.1f} MiB in {len(files)} files, and at most "
                f"{MAX_BYTES / 2**20:g} MiB are allowed: name the others in 'excludes', or give a URI"
            )
        return _zipped([prefix for _, prefix, _ in folders], members, version)
    except OSError as e:
        raise ConfigError(f"runtime_env: a directory cannot be read: {e}") from e


class UnpackedRuntimeEnv:
    """The unpacked directories of one replica, in a temporary directory of its own until `remove`.

    Raises:
        PenstockError: they cannot be written.
    """

    def __init__(self, archive: bytes) -> None:
        _remove_abandoned()
        self._before: tuple[str, list[str]] | None = None
        try:
            self._root, self._lock = _make()
            with ZipFile(BytesIO(archive)) as members:
                for member in members.infolist():
                    os.chmod(members.extract(member, self._root), stat.S_IMODE(member.external_attr >> 16))
        except OSError as e:
            raise PenstockError(f"cannot unpack the directories of runtime_env: {e}") from e

    def enter(self) -> None:
        """Make the unpacked working directory that of this process, and import from it and from the modules."""
        self._before = os.getcwd(), list(sys.path)
        modules = self._root / PY_MODULES
        if modules.is_dir():
            sys.path[:0] = [str(path) for path in sorted(modules.iterdir(), key=lambda path: int(path.name))]
        working_dir = self._root / WORKING_DIR
        if working_dir.is_dir():
            os.chdir(working_dir)
            sys.path.insert(0, str(working_dir))

    def remove(self) -> None:
        """Undo `enter`, and delete the directories."""
        if self._before is not None:
            directory, sys.path[:] = self._before
            os.chdir(directory)
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)


def _is_local(path: str) -> bool:
    return "://" not in path


def _directory(kind: str, path: str) -> Path:
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        raise ConfigError(
            f"{kind} of runtime_env must be a directory of this machine, or a URI such as 'https://…/code.zip'; "
            f"there is no directory {path!r}"
        )
    return folder


def _walk(folder: Path, excluded: Sequence[Excluded], above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files and directories in ``folder`` in sorted order, each directory before its contents."""
    here = folder.resolve()
    if here in above:
        raise ConfigError(f"runtime_env: the link {str(folder)!r} leads to a directory that contains it")
    ignored = [folder / name for name in _IGNORE_FILES if (folder / name).is_file()]
    patterns = [_matcher(folder, path.read_text(encoding="utf-8").splitlines()) for path in ignored]
    excluded = [*excluded, *patterns]
    for path in sorted(folder.iterdir()):
        if any(is_excluded(path) for is_excluded in excluded):
            continue
        if path.is_dir():
            yield path
            yield from _walk(path, excluded, (*above, here))
        elif path.is_file():
            yield path


def _matcher(folder: Path, patterns: Sequence[str]) -> Excluded:
    from pathspec import GitIgnoreSpec  # Replicas and the controller do not pack.

    spec = GitIgnoreSpec.from_lines(patterns)

    def is_excluded(path: Path) -> bool:
        relative = path.relative_to(folder).as_posix()
        return spec.match_file(f"{relative}/" if path.is_dir() else relative)

    return is_excluded


def _zipped(folders: Sequence[str], members: Sequence[tuple[str, Path]], version: str) -> bytes:
    packed = BytesIO()
    with ZipFile(packed, "w", ZIP_DEFLATED) as archive:
        for name in folders:
            archive.writestr(_info(f"{name}/", 0o755), b"")
        for name, path in members:
            if path.is_dir():
                archive.writestr(_info(f"{name}/", 0o755), b"")
            else:
                executable = path.stat().st_mode & stat.S_IXUSR
                archive.writestr(_info(name, 0o755 if executable else 0o644), path.read_bytes())
        archive.comment = version.encode()
    return packed.getvalue()


def _info(name: str, mode: int) -> ZipInfo:
    info = ZipInfo(name)  # with the constant date of 1980
    info.external_attr = mode << 16
    info.compress_type = ZIP_DEFLATED
    return info


def _make() -> tuple[Path, int]:
    """Return a new directory, and the file descriptor that holds a lock on it while this process lives."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = os.open(hidden, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return hidden.rename(hidden.with_name(hidden.name[1:])), lock


def _remove_abandoned() -> None:
    """Delete the directories of replicas that were killed on this node."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # it was just removed, or is another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its replica is alive
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
