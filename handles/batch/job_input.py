"""Input of a batch job: a chain of hashes over its rows, stored as the job proceeds.

A producer that continues a job reads its input from the first row on, and skips the rows that are done. Each block of
rows that an earlier producer has read must have the hash that it had then. So the results of one input never stand for
another.
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
    """The end of a block of rows."""

    rows: int
    """Number of rows from the beginning of the input to here."""
    digest: bytes
    """Hash over these rows."""
    is_last: bool = False
    """Whether the input ended here."""


class InputChain:
    """Compares the rows of an input, in order, with the blocks that the job has stored."""

    def __init__(self, job: str, known: Sequence[Block], *, may_grow: bool = False) -> None:
        """Create a chain that has no rows yet.

        Args:
            job: name of the job, for error messages.
            known: the stored blocks.
            may_grow: more rows may follow where the input ended before, as new files of a directory do.
        """
        self._job, self._may_grow = job, may_grow
        self._hash = blake2b(digest_size=_DIGEST_BYTES)
        self._known = sorted(known, key=lambda block: block.rows)
        self._next_block = 0
        self.rows = 0
        """Number of rows that were added."""
        self.verified = 0
        """Number of rows, from the beginning, that are known to be those of the job."""

    @property
    def known_rows(self) -> int:
        """Number of rows that earlier producers of the job have read."""
        return self._known[-1].rows if self._known else 0

    def add(self, row: bytes) -> None:
        """Add the next row.

        Raises:
            ConfigError: it, or a row before it, is not the job's.
        """
        self._hash.update(b"%d:" % len(row))
        self._hash.update(row)
        self.rows += 1
        if self._next_block == len(self._known):
            self._check_end()
            self.verified = self.rows
        while self._next_block < len(self._known) and self._known[self._next_block].rows == self.rows:
            block = self._known[self._next_block]
            if block.digest != self._hash.digest():
                raise self._refusal(f"its rows {self.verified + 1} to {block.rows} were others when the job began")
            self._next_block += 1
            self.verified = self.rows

    def end(self) -> None:
        """End the input.

        Raises:
            ConfigError: the job has more rows.
        """
        if self.rows < self.known_rows:
            raise self._refusal(f"it has {self.rows} rows, and at least {self.known_rows} when the job began")

    def block(self, *, is_last: bool = False) -> Block | None:
        """Return the block of the rows so far, for the job to store; None if the job has it."""
        if self._next_block < len(self._known):
            return None
        known = self._known[-1] if self._known else None
        if known is not None and known.rows >= self.rows and (known.is_last or not is_last):
            return None
        return Block(self.rows, self._hash.digest(), is_last)

    def _check_end(self) -> None:
        """Check a row behind the stored ones: the input must not have ended there."""
        if self._known and not self._may_grow and any(b.is_last and b.rows < self.rows for b in self._known[-2:]):
            raise self._refusal(f"it has more than the {self.known_rows} rows with which the job ended")

    def _refusal(self, reason: str) -> ConfigError:
        return other_input(self._job, reason)


def other_input(job: str, reason: str) -> ConfigError:
    """Return the error for an input that is not the job's."""
    return ConfigError(
        f"the job {job!r} belongs to another input: {reason}. Give this input a job of its own, such as "
        f"--job {job}-{date.today().isoformat()}, or begin the job anew with --restart-job (restart_job=True)"
    )


def put_in_order(job: str, names: list[str], known: Sequence[str]) -> list[str]:
    """Sort file names in place: those that the job has in its order, then the new ones. Return the new ones.

    Raises:
        ConfigError: a file of the job is missing.
    """
    present, before = set(names), set(known)
    if missing := [name for name in known if name not in present]:
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        raise other_input(job, f"its file {missing[0]!r} is gone{more}")
    new = [name for name in names if name not in before]
    names[:] = [*known, *new]
    return new


def dump_names(names: Sequence[str]) -> bytes:
    """Return file names, which need not be UTF-8, as `load_names` reads them."""
    return zlib.compress(exact_json.dumps(names))


def load_names(raw: bytes) -> list[str]:
    """Return the names that `dump_names` wrote."""
    return [str(name) for name in exact_json.loads(zlib.decompress(raw))]
