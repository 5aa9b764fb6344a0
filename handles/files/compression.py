"""Compressed files: gzip and zstd, found by how a file begins when it is read and by its name when it is written."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO, Any, BinaryIO, cast

from .optional import import_optional

Buffered = Any
"""An ``io.BufferedReader``, which type checkers know by its methods."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ENDINGS = (".gz", ".zst")
_ZSTD_CHUNK_BYTES = 16 * 1024
"""Compressed bytes that are decompressed at a time."""
_MAX_WINDOW_BYTES = 2**31
"""Of zstd, as ``zstd --long=31`` writes it."""


def without_ending(path: str) -> str:
    """Return ``path`` without the ending of a compressed file."""
    for ending in ENDINGS:
        if path.lower().endswith(ending):
            return path[: -len(ending)]
    return path


def decompressed(raw: Buffered, shown: str) -> Buffered:
    """Return a reader of ``raw`` that decompresses it if it is compressed.

    Reading from it raises ``OSError``, ``zlib.error`` or ``EOFError`` where that is broken or cut off.

    Raises:
        ConfigError: it is compressed by zstd, and the package for that is not installed.
    """
    start = raw.peek(4)[:4]
    if start.startswith(_GZIP):
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)))
    if start.startswith(_ZSTD):
        zstandard = import_optional("zstandard", f"{shown} is compressed by zstd, and reading it")
        return io.BufferedReader(_ZstdFile(raw, zstandard), 128 * 1024)
    return raw


class _ZstdFile(io.RawIOBase):
    """The frames of a file, decompressed. zstandard's own reader takes a file that was cut off for a whole one."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        super().__init__()
        self._raw, self._error = raw, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_ZSTD_CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as e:
                raise zlib.error(str(e)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(self._output), len(buffer))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def compressed(file: BinaryIO, path: str) -> IO[bytes]:
    """Return a writer to ``file`` that compresses as the ending of ``path`` names; closing it leaves ``file`` open.

    Raises:
        ConfigError: that is zstd, and the package for it is not installed.
    """
    if path.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0))
    if path.lower().endswith(".zst"):
        zstandard = import_optional("zstandard", f"{path}: writing a file that is compressed by zstd")
        return cast("IO[bytes]", zstandard.ZstdCompressor().stream_writer(file, closefd=False))
    return cast("IO[bytes]", _Open(file))


class _Open(io.RawIOBase):
    """A file that stays open when this is closed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self._file.write(data)
