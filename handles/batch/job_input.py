"""The input that a batch job belongs to: a chain of hashes over its rows, kept as the job proceeds.

A producer that goes on with a job reads its input from the first row on and skips what is done. Each block of rows that
was read before must have the hash that it had then; so results of one input never stand for another one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b

from ...broker.wire import exact_json
from ..errors import ConfigError

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Block:
    """Where one block of rows ends, and the hash over all rows up to there."""

    rows: int
    digest: bytes
    is_last: bool = False
    """The input ended there."""


class InputChain:
    """Compares the rows of an input, in order, with those that its job began with."""

    def __init__(self, job: str, known: Sequence[Block], *, may_grow: bool = False) -> None:
        """``may_grow``: rows may follow where the input has ended before, as new files of a directory do."""
        self._job, self._may_grow = job, may_grow
        self._hash = blake2b(digest_size=_DIGEST_BYTES)
        self._known = sorted(known, key=lambda block: block.rows)
        self._next = 0
        self.rows = 0
        self.verified = 0
        """Rows that are known to be those of the job."""

    @property
    def known_rows(self) -> int:
        """How many rows earlier producers of the job have read."""
        return self._known[-1].rows if self._known else 0

    def add(self, row: bytes) -> None:
        """Take the next row. Raises ``ConfigError``: it, or one before it, is not the job's."""
        self._hash.update(b"%d:" % len(row))
        self._hash.update(row)
        self.rows += 1
        if self._next == len(self._known):
            self._check_end()
            self.verified = self.rows
        while self._next < len(self._known) and self._known[self._next].rows == self.rows:
            block = self._known[self._next]
            if block.digest != self._hash.digest():
                raise self._refusal(f"its rows {self.verified + 1} to {block.rows} were others when the job began")
            self._next += 1
            self.verified = self.rows

    def end(self) -> None:
        """Take the end of the input. Raises ``ConfigError``: there were more rows."""
        if self.rows < self.known_rows:
            raise self._refusal(f"it has {self.rows} rows, and at least {self.known_rows} when the job began")

    def block(self, *, is_last: bool = False) -> Block | None:
        """Return what is to be kept of the rows so far; None if that is known."""
        if self._next < len(self._known):
            return None
        known = self._known[-1] if self._known else None
        if known is not None and known.rows >= self.rows and (known.is_last or not is_last):
            return None
        return Block(self.rows, self._hash.digest(), is_last)

    def _check_end(self) -> None:
        if self._known and not self._may_grow and any(b.is_last and b.rows < self.rows for b in self._known[-2:]):
            raise self._refusal(f"it has more than the {self.known_rows} rows with which the job ended")

    def _refusal(self, reason: str) -> ConfigError:
        return other_input(self._job, reason)


def other_input(job: str, reason: str) -> ConfigError:
    """Return the refusal of an input that is not the job's."""
    return ConfigError(
        f"the job {job!r} belongs to another input: {reason}. Give this input a job of its own, such as "
        f"--job {job}-{date.today().isoformat()}, or begin the job anew with --restart-job (restart_job=True)"
    )


def put_in_order(job: str, names: list[str], known: Sequence[str]) -> list[str]:
    """Put the files of a directory, in place, into the order that they have in the job; return the new ones.

    Raises:
        ConfigError: a file of the job is gone.
    """
    there, before = set(names), set(known)
    if gone := [name for name in known if name not in there]:
        raise other_input(job, f"its file {gone[0]!r} is gone" + (f", and {len(gone) - 1} more" if gone[1:] else ""))
    new = [name for name in names if name not in before]
    names[:] = [*known, *new]
    return new


def dump_names(names: Sequence[str]) -> bytes:
    """Return names of files, which need not be UTF-8, as `load_names` reads them."""
    return zlib.compress(exact_json.dumps(names))


def load_names(raw: bytes) -> list[str]:
    return [str(name) for name in exact_json.loads(zlib.decompress(raw))]
