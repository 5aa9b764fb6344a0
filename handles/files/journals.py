"""Journals: the lines of a batch in the order of its results, kept so that a job can go on with them.

A line is durable once `sync` has returned. A journal that was cut off while a line was written has all lines before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .sources import named, open_file_system, shown_path

_PART_BYTES = 8 * 1024 * 1024
"""Of lines that are kept in memory before they are stored as a remote part."""


class Journal(Protocol):
    shown: str
    sync_every_s: float
    """How often `sync` is worth calling."""

    def lines(self) -> Iterator[bytes]:
        """Yield all whole lines, and drop a partial line at the end. To be called before the first `write`."""
        ...

    def write(self, line: bytes) -> None: ...

    def sync(self) -> None:
        """Return when all lines are durable."""
        ...

    def clear(self) -> None:
        """Delete all lines."""
        ...

    def remove(self) -> None:
        """Delete it; nothing is written after that."""
        ...

    def close(self) -> None: ...


class LocalJournal:
    """A file to which lines are appended.

    Raises:
        OSError: it cannot be written.
    """

    sync_every_s = 1.0

    def __init__(self, path: str) -> None:
        self.shown = self._path = path
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`

    def lines(self) -> Iterator[bytes]:
        self._file.flush()
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(whole)  # its writer was killed in the middle of it
                return
            whole += len(line)
            yield line

    def write(self, line: bytes) -> None:
        self._file.write(line)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        self._file.truncate(0)

    def remove(self) -> None:
        self.close()
        Path(self._path).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


class RemoteJournal:
    """Files below a URL, each with some lines. A stored file is never changed.

    Raises:
        OSError: it cannot be reached.
        ConfigError: the protocol of the URL is unknown, or needs a package that is not installed.
    """

    sync_every_s = 10.0

    def __init__(self, url: str, storage_options: Mapping[str, Any] = {}) -> None:
        self.shown = shown_path(url)
        self._system, self._root = open_file_system(url, storage_options)
        self._parts = self._list()
        self._next = 1 + max((int(part.rpartition("/")[2].partition(".")[0]) for part in self._parts), default=0)
        self._waiting = bytearray()

    def _list(self) -> list[str]:
        try:
            self._system.invalidate_cache()
            found = self._system.find(self._root)
        except FileNotFoundError:
            return []
        except Exception as e:
            raise named(e, self.shown) from None
        return sorted(part for part in found if part.endswith(".jsonl"))

    def lines(self) -> Iterator[bytes]:
        for part in self._parts:
            try:
                content: bytes = self._system.cat_file(part)
            except Exception as e:
                raise named(e, self.shown) from None
            yield from content.splitlines(keepends=True)

    def write(self, line: bytes) -> None:
        self._waiting += line
        if len(self._waiting) >= _PART_BYTES:
            self.sync()

    def sync(self) -> None:
        if not self._waiting:
            return
        part = f"{self._root}/{self._next:08}.jsonl"
        try:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(part, bytes(self._waiting))
        except Exception as e:
            raise named(e, self.shown) from None
        self._next += 1
        self._parts.append(part)
        self._waiting.clear()

    def clear(self) -> None:
        try:
            for part in self._parts:
                self._system.rm_file(part)
        except Exception as e:
            raise named(e, self.shown) from None
        self._parts.clear()
        self._waiting.clear()

    def remove(self) -> None:
        self.clear()
        try:
            if self._system.isdir(self._root):  # else it was no more than the names of its files
                self._system.rmdir(self._root)
        except Exception as e:
            raise named(e, self.shown) from None

    def close(self) -> None:
        """Nothing is open."""
