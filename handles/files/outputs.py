"""The output of a batch, and which rows have a line in it already.

=============================  ===================================================================================
output                         how a job goes on with it
=============================  ===================================================================================
a file of JSON lines           it is its own journal
CSV, Parquet, compressed       ``OUTPUT.journal`` beside it has the lines; the file is made of them when a run ends
a URL                          ``OUTPUT.journal/`` there has the lines, in parts
a pipe, a device, ``-``        not at all: it takes JSON lines as they come
=============================  ===================================================================================
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from ...broker.wire import exact_json
from ..batch.items import Indices
from ..errors import ConfigError
from .journals import Journal, LocalJournal, RemoteJournal
from .sources import is_url, named, open_file_system, shown_path
from .tables import check_packages, is_plain, sync_file, write_table

_STREAMS = ("-", "/dev/stdout", "/dev/fd/1")
JOURNAL = ".journal"


def is_resumable(output: str) -> bool:
    """Return whether a job can go on with ``output``; devices, pipes and sockets cannot be read again."""
    return is_url(output) or (output not in _STREAMS and (Path(output).is_file() or not os.path.lexists(output)))


class StreamOutput:
    """A device, a pipe or standard output. Raises ``OSError``: it cannot be written."""

    sync_every_s = 0.05
    is_durable = False

    def __init__(self, path: str) -> None:
        self.done, self.failed = Indices(), Indices()
        self._is_standard = path in _STREAMS
        self._file: IO[bytes] = sys.stdout.buffer if self._is_standard else open(path, "wb")  # noqa: SIM115

    def write(self, line: bytes) -> None:
        self._file.write(line)

    def sync(self) -> None:
        self._file.flush()

    def clear(self) -> None:
        """Nothing is kept."""

    def finish(self, *, keep_journal: bool) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self._is_standard:
            self._file.close()


class FileOutput:
    """A file, here or behind a URL, that a job can go on with.

    Args:
        path: of the file.
        retry_errors: rows that are error lines are to be run again.
        restart: ignore an existing output; `clear` deletes it.

    Raises:
        OSError: it cannot be written.
        ConfigError: there is something else in it; or a package is missing that writes it.
    """

    is_durable = True

    def __init__(self, path: str, *, retry_errors: bool, restart: bool) -> None:
        check_packages(path)
        self._path = path
        self.done = Indices()
        """Rows that are not to be run again."""
        self.failed = Indices()
        """Rows whose line is an error."""
        self._repeated = Indices()
        """Rows that have, or will have, more than one line: the last one counts."""
        self._is_own_journal = is_plain(path) and not is_url(path)
        if is_url(path):
            self._journal: Journal = RemoteJournal(path + JOURNAL)
        else:
            self._journal = LocalJournal(path if self._is_own_journal else path + JOURNAL)
        self.sync_every_s = self._journal.sync_every_s
        try:
            if not restart:
                self._read()
                if not self._is_own_journal and not len(self.done) and exists(path):
                    raise ConfigError(
                        f"{shown_path(path)} exists, and has no journal to go on with: give another --output"
                    )
        except BaseException:
            self._journal.close()
            raise
        if retry_errors:
            for index in self.failed:
                self.done.discard(index)
                self._repeated.add(index)

    def _read(self) -> None:
        for number, line in enumerate(self._journal.lines(), start=1):
            try:
                written = exact_json.loads(line)
                index = written["index"]
                if index in self.done:
                    self._repeated.add(index)
                self.done.add(index)
                (self.failed.add if "error" in written else self.failed.discard)(index)
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{self._journal.shown}: line {number} was not written by a batch: give another --output"
                ) from None

    def write(self, line: bytes) -> None:
        self._journal.write(line)

    def sync(self) -> None:
        """Return when all that was written is durable."""
        self._journal.sync()

    def clear(self) -> None:
        """Delete an existing output, for a job that begins anew."""
        self._journal.clear()

    def close(self) -> None:
        self._journal.close()

    def finish(self, *, keep_journal: bool) -> None:
        """Make the output of its journal, in one step, without the error lines of rows that were run again."""
        self._journal.sync()
        if self._is_own_journal:
            if len(self._repeated):
                self._replace(os.path.realpath(self._path))
            return
        if is_url(self._path):
            self._upload()
        else:
            self._replace(os.path.realpath(self._path))
        if not keep_journal:
            self._journal.remove()

    def _replace(self, target: str) -> None:
        folder, name = os.path.split(target)
        descriptor, fresh = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                write_table(self._lines_that_count, file, self._path)
                sync_file(file)
            if os.path.exists(target):
                shutil.copymode(target, fresh)
            else:
                os.chmod(fresh, 0o666 & ~_umask())
            os.replace(fresh, target)
        except BaseException:
            os.unlink(fresh)
            raise

    def _upload(self) -> None:
        shown = shown_path(self._path)
        system, path = open_file_system(self._path, {})
        with tempfile.NamedTemporaryFile(prefix="penstock-") as file:
            write_table(self._lines_that_count, cast(BinaryIO, file), self._path)
            file.flush()
            try:
                system.put_file(file.name, path)
            except Exception as e:
                raise named(e, shown) from None

    def _lines_that_count(self) -> Iterator[bytes]:
        if not len(self._repeated):
            yield from self._journal.lines()
            return
        last: dict[int, int] = {}
        for number, line in enumerate(self._journal.lines()):
            if (index := exact_json.loads(line)["index"]) in self._repeated:
                last[index] = number
        for number, line in enumerate(self._journal.lines()):
            if last.get(exact_json.loads(line)["index"], number) == number:
                yield line


Output = StreamOutput | FileOutput


def open_output(path: str, **options: Any) -> Output:
    """Return the output ``path``; for the options see `FileOutput`."""
    return FileOutput(path, **options) if is_resumable(path) else StreamOutput(path)


def exists(path: str) -> bool:
    """Return whether there is a file ``path``, which may be a URL. Raises ``OSError``: that cannot be found out."""
    if not is_url(path):
        return os.path.lexists(path)
    system, within = open_file_system(path, {})
    try:
        return bool(system.exists(within))
    except Exception as e:
        raise named(e, shown_path(path)) from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
