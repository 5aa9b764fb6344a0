"""Sources of an input: a file, a directory, a glob pattern, a URL or standard input, as a list of files to open.

URLs are opened by fsspec, which brings some protocols itself and names the package that it needs for another one.
``file://`` is a local path and needs nothing.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote

from ..errors import ConfigError
from .optional import import_optional

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(://|::)")
_SECRETS = re.compile(r"(?<=://)[^\s/@]*@|(?<=\w)[?#][^\s'\"]*")
"""Queries and credentials of URLs in the messages of other packages."""
_BLOCK_BYTES = 1024 * 1024
"""How much of a remote file is fetched at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of an input."""

    name: str
    """Below the directory, or as a glob pattern found it: it names the rows of this file."""
    shown: str
    """For messages: without credentials."""
    size: int | None
    """Bytes; None if that is not known."""
    open: Callable[[], io.RawIOBase]
    """Opens it. Raises ``OSError``."""


@dataclass(frozen=True, slots=True)
class Input:
    """All files of an input, in the order of their names."""

    kind: Literal["file", "directory", "pattern"]
    name: str
    """It names the input of a job: an absolute path, or a URL without credentials."""
    shown: str
    sources: list[Source]


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def without_file_scheme(path: str) -> str:
    """Return the local path that a ``file://`` URL means; any other path as it is."""
    if not path.lower().startswith("file://"):
        return path
    return unquote(re.sub(r"(?i)^file://(localhost(?=/))?", "", path))


def is_http(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def shown_path(path: str) -> str:
    """Return a path or URL for messages: without the credentials and options of a URL."""
    if path == "-":
        return "standard input"
    if not is_url(path):
        return path
    before, separator, rest = path.rpartition("://")
    host, slash, behind = rest.partition("/")
    if is_http(path):
        behind = re.split(r"[?#]", behind, maxsplit=1)[0]
    return f"{before}{separator}{host.rpartition('@')[2]}{slash}{behind}"


def find(path: str, storage_options: Mapping[str, Any] = {}) -> Input:
    """Return the files that ``path`` stands for; ``storage_options`` are those of fsspec's file system.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
        ConfigError: the protocol of a URL is unknown, or needs a package that is not installed.
    """
    if path == "-":
        source = Source("-", shown_path(path), None, lambda: Reading(_standard_input(), "standard input"))
        return Input("file", "-", "standard input", [source])
    path = without_file_scheme(path)
    if is_url(path):
        return _find_remote(path, storage_options)
    name = os.fsencode(os.path.abspath(path)).decode(errors="backslashreplace")
    if os.path.isdir(path):
        return Input("directory", name, path, _below(path))
    if glob.has_magic(path) and not os.path.lexists(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise FileNotFoundError(2, "no file matches this pattern", path)
        return Input("pattern", name, path, [_local(file, file) for file in found])
    return Input("file", name, path, [_local(path, path)])


def _below(path: str) -> list[Source]:
    """Return the files of a directory and of those in it, but for hidden ones."""
    os.scandir(path).close()  # raises if it cannot be read
    root = Path(path)
    names = sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    return [_local(name, os.path.join(path, name)) for name in names]


def _local(name: str, path: str) -> Source:
    try:
        size = os.stat(path).st_size if os.path.isfile(path) else None
    except OSError:
        size = None
    return Source(name, path, size, lambda: Reading(open(path, "rb", buffering=0), path))


def _standard_input() -> Any:
    # Unbuffered, so that rows are there as soon as they are written.
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)


def open_file_system(path: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path within it.

    Raises:
        OSError: it cannot be reached.
        ConfigError: its protocol is unknown, or needs a package that is not installed.
    """
    shown = shown_path(path)
    fsspec_core = import_optional("fsspec.core", f"{shown}: a URL")
    try:
        return cast("tuple[Any, str]", fsspec_core.url_to_fs(path, **storage_options))
    except ImportError as e:
        raise ConfigError(f"{shown}: its protocol needs a package that is not installed: {e}") from None
    except ValueError as e:
        raise ConfigError(f"{shown}: {e}") from None
    except Exception as e:
        raise named(e, shown) from None


def _find_remote(path: str, storage_options: Mapping[str, Any]) -> Input:
    shown = shown_path(path)
    system, root = open_file_system(path, storage_options)
    try:
        if is_http(path):  # a "?" there begins a query, and there are no directories
            return Input("file", shown, shown, [_remote(system, root, shown, shown, system.info(root).get("size"))])
        if glob.has_magic(root) and not system.exists(root):
            infos = system.glob(root, detail=True)
            sources = [
                _remote(system, file, file, f"{shown.partition('://')[0]}://{file}", info.get("size"))
                for file, info in sorted(infos.items())
                if info["type"] == "file" and not file.rpartition("/")[2].startswith(".")
            ]
            if not sources:
                raise FileNotFoundError(2, "no file matches this pattern", shown)
            return Input("pattern", shown, shown, sources)
        info = system.info(root)
        if info["type"] != "directory":
            return Input("file", shown, shown, [_remote(system, root, shown, shown, info.get("size"))])
        stem = system._strip_protocol(root).rstrip("/") + "/"
        names = {file.removeprefix(stem): (file, info) for file, info in system.find(root, detail=True).items()}
        return Input(
            "directory",
            shown,
            shown,
            [
                _remote(system, file, name, f"{shown.rstrip('/')}/{name}", info.get("size"))
                for name, (file, info) in sorted(names.items())
                if not any(part.startswith(".") for part in name.split("/")) and not name.endswith("/")
            ],
        )
    except Exception as e:
        raise named(e, shown) from None


def _remote(system: Any, path: str, name: str, shown: str, size: int | None) -> Source:
    def open_remote() -> io.RawIOBase:
        try:
            return Reading(system.open(path, "rb", block_size=_BLOCK_BYTES), shown)
        except Exception as e:
            raise named(e, shown) from None

    return Source(name, shown, size, open_remote)


def named(error: Exception, shown: str) -> OSError:
    """Return the error of a file as an ``OSError`` that names it."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror or os.strerror(error.errno), shown)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(2, os.strerror(2), shown)
    kind = "" if isinstance(error, OSError | EOFError) else f"{type(error).__name__}: "
    return OSError(0, f"it cannot be read: {kind}{_SECRETS.sub('', str(error))}", shown)


class Reading(io.RawIOBase):
    """An open file that counts the bytes read, and whose errors name it."""

    def __init__(self, file: Any, shown: str) -> None:
        super().__init__()
        self._file, self.shown = file, shown
        self.count = 0
        """Bytes that were read."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        # Remote files of unknown size say that they can, and cannot.
        return bool(self._file.seekable()) and getattr(self._file, "size", 0) is not None

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any, /) -> int:
        try:
            count = int(self._file.readinto(buffer))
        except Exception as e:  # file systems raise errors of their own
            raise named(e, self.shown) from None
        self.count += count
        return count

    def close(self) -> None:
        if not self.closed and not self._is_standard_input():
            self._file.close()
        super().close()

    def _is_standard_input(self) -> bool:
        return self._file in (sys.stdin.buffer, getattr(sys.stdin.buffer, "raw", None))
