"""The output of a batch: lines of JSON in a regular file that a job goes on with, or in a stream."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

from ...broker.wire import exact_json
from ...handles.batch.items import Indices

_STREAMS = ("-", "/dev/stdout", "/dev/fd/1")


def is_regular_file(output: str) -> bool:
    """Return whether a batch can go on with ``output``; devices, pipes and sockets only take what comes."""
    return output not in _STREAMS and (Path(output).is_file() or not os.path.lexists(output))


class Output:
    """Where lines go, and which rows have one already.

    Args:
        path: of a file; ``-`` is standard output.
        retry_errors: rows that are error lines are to be run again.
        restart: what is in the file counts for nothing: `empty` deletes it.

    Raises:
        OSError: it cannot be written.
        ValueError: there is something else in it.
    """

    def __init__(self, path: str, *, retry_errors: bool, restart: bool) -> None:
        self._path, self._is_regular = path, is_regular_file(path)
        self.done = Indices()
        """Rows that are not to be run again."""
        self.failed = Indices()
        """Rows whose line is an error."""
        self._repeated = Indices()
        """Rows that have, or will have, more than one line: the last one counts."""
        if path in _STREAMS:
            self.file: IO[bytes] = sys.stdout.buffer
            return
        if not self._is_regular:
            self.file = open(path, "wb")  # noqa: SIM115 - closed by `close`
            return
        self.file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            if not restart:
                self._read()
        except BaseException:
            self.file.close()
            raise
        if retry_errors:
            for index in self.failed:
                self.done.discard(index)
                self._repeated.add(index)

    def empty(self) -> None:
        """Delete what is in the file, for a job that begins anew."""
        if self._is_regular:
            self.file.truncate(0)

    def close(self) -> None:
        if self._path not in _STREAMS:
            self.file.close()

    def finish(self) -> None:
        """Drop the error lines of rows that were run again: the file is replaced at once, by one without them."""
        if not len(self._repeated):
            return
        self.file.flush()
        target = Path(os.path.realpath(self._path))
        last: dict[int, int] = {}
        with open(target, "rb") as file:
            for number, line in enumerate(file):
                if (index := exact_json.loads(line)["index"]) in self._repeated:
                    last[index] = number
            file.seek(0)
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            try:
                with open(descriptor, "wb") as fresh:
                    for number, line in enumerate(file):
                        if last.get(exact_json.loads(line)["index"], number) == number:
                            fresh.write(line)
                    fresh.flush()
                    os.fsync(fresh.fileno())
                shutil.copymode(target, name)
                os.replace(name, target)
            except BaseException:
                os.unlink(name)
                raise

    def _read(self) -> None:
        self.file.seek(0)
        whole = 0
        for number, line in enumerate(self.file, start=1):
            if not line.endswith(b"\n"):
                break  # its writer was killed in the middle of it
            try:
                written = exact_json.loads(line)
                index = written["index"]
                if index in self.done:
                    self._repeated.add(index)
                self.done.add(index)
                (self.failed.add if "error" in written else self.failed.discard)(index)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self._path}: line {number} was not written by a batch: give another --output"
                ) from None
            whole += len(line)
        self.file.truncate(whole)
