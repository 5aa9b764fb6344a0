"""Commands as bytes: packed whole, or in pieces where copying a large argument would cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Union, cast

import hiredis

Arg = Union[str, bytes, int, float]  # noqa: UP007 - it is evaluated, also on Python 3.10
Then = Callable[[Any], None]
Packed = Union[bytes, list[bytes]]  # noqa: UP007
"""A command as it is sent, whole or in pieces."""

pack = cast("Callable[[tuple[Arg, ...]], bytes]", hiredis.pack_command)

_HEAD_BYTES = 8 * 1024
COPIED_BYTES = 64 * 1024
"""A longer argument is worth not to be copied next to the others: that makes its command a bulky one."""


class Script:
    """A Lua script, sent whole once over each connection and called by its digest (``EVALSHA``) from then on."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Redis names scripts by SHA-1; nothing here rests on its strength.
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Command:
    """A command from its packing to its reply."""

    __slots__ = ("bulky_reply", "needs_memory", "packed", "patient", "prompt", "repeat", "retry", "then")

    def __init__(
        self,
        packed: Packed,
        then: Then,
        repeat: bool,
        retry: Callable[[], Packed] | None,
        patient: bool = False,
        prompt: bool = False,
        bulky_reply: bool = False,
        needs_memory: bool = False,
    ) -> None:
        self.packed, self.then = packed, then
        self.repeat = repeat
        """It does no harm if it is carried out twice."""
        self.retry = retry
        """Packs it anew for a server that does not have its script."""
        self.patient = patient
        """It waits for as long as the broker is away or refuses it, and keeps its place among others that do."""
        self.prompt = prompt
        """It fails when the broker refuses it, even if that will pass."""
        self.needs_memory = needs_memory
        """It fails when the broker is out of memory, even if it is patient: its sender has another way then."""
        self.bulky_reply = bulky_reply
        """Its reply may be a string that is worth to be read straight to where it stays."""


def pack_in_pieces(args: Sequence[Arg]) -> list[bytes]:
    """Pack a command, but leave its large arguments as they are.

    Commands are arrays of bulk strings (https://redis.io/docs/latest/develop/reference/protocol-spec/#arrays). To pack
    10 MiB costs two copies of it, and was a quarter of the time that such a request took.
    """
    pieces: list[bytes] = []
    packed, since = b"*%d\r\n" % len(args), 0
    for at, arg in enumerate(args):
        if isinstance(arg, bytes) and len(arg) > COPIED_BYTES:
            pieces += (b"%b%b$%d\r\n" % (packed, _pack_some(args[since:at]), len(arg)), arg)
            packed, since = b"\r\n", at + 1
    return [*pieces, packed + _pack_some(args[since:])]


def _pack_some(args: Sequence[Arg]) -> bytes:
    """Pack what is not yet the whole of a command: without the count in its first line."""
    return pack(tuple(args)).partition(b"\r\n")[2] if args else b""


def head_of(packed: Packed) -> list[bytes]:
    """Return a command's first arguments: its name and its keys, none of which has a line end in it, and some more."""
    return pieces_of(packed)[0][:_HEAD_BYTES].split(b"\r\n")[2::2]


def pieces_of(packed: Packed) -> Sequence[bytes]:
    return (packed,) if isinstance(packed, bytes) else packed
