"""Encoding of Redis commands: as one buffer, or in pieces that leave large arguments uncopied."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Union, cast

import hiredis

log = logging.getLogger(__name__)

Arg = Union[str, bytes, int, float]  # noqa: UP007 - it is evaluated, also on Python 3.10
Then = Callable[[Any], None]
Packed = Union[bytes, list[bytes]]  # noqa: UP007
"""An encoded command, as one buffer or in pieces."""

pack = cast("Callable[[tuple[Arg, ...]], bytes]", hiredis.pack_command)

_HEAD_BYTES = 8 * 1024
"""How much of a command is searched for its first arguments."""
COPIED_BYTES = 64 * 1024
"""Longer arguments are not copied; a command that has one is *bulky*."""


class Script:
    """A Lua script, sent whole once over each connection (``EVAL``) and by its digest (``EVALSHA``) from then on."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Redis identifies scripts by SHA-1; security does not depend on it.
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Command:
    """An encoded command that waits to be sent or for its reply; ``then`` gets the reply or an exception."""

    __slots__ = ("bulky_reply", "needs_memory", "pack_whole", "packed", "patient", "prompt", "repeat", "then")

    def __init__(
        self,
        packed: Packed,
        then: Then,
        repeat: bool,
        pack_whole: Callable[[], Packed] | None,
        patient: bool = False,
        prompt: bool = False,
        bulky_reply: bool = False,
        needs_memory: bool = False,
    ) -> None:
        self.packed, self.then = packed, then
        self.repeat = repeat
        """It may be carried out twice, so it is sent again after a lost connection."""
        self.pack_whole = pack_whole
        """Encodes it with its whole script, for a server that does not have that; None for a command without one."""
        self.patient = patient
        """It waits for as long as the broker is unreachable or refuses it, in order with the other patient commands."""
        self.prompt = prompt
        """It fails when the broker refuses it, even for a temporary reason."""
        self.needs_memory = needs_memory
        """It fails when the broker is out of memory, even if it is patient: its sender has a fallback."""
        self.bulky_reply = bulky_reply
        """Its reply may be a large string, to be read straight into its final buffer."""

    def complete(self, result: Any) -> None:
        """Call ``then`` with the reply or an exception. Never raises."""
        try:
            self.then(result)
        except Exception:
            log.exception("a reply's continuation failed")


def pack_in_pieces(args: Sequence[Arg]) -> list[bytes]:
    """Encode a command, with each large argument as a piece of its own that is not copied.

    Commands are arrays of bulk strings (https://redis.io/docs/latest/develop/reference/protocol-spec/#arrays). Encoding
    10 MiB as one buffer copies it twice, which was a quarter of the time of such a request.
    """
    pieces: list[bytes] = []
    packed, since = b"*%d\r\n" % len(args), 0
    for at, arg in enumerate(args):
        if isinstance(arg, bytes) and len(arg) > COPIED_BYTES:
            pieces += (b"%b%b$%d\r\n" % (packed, _pack_some(args[since:at]), len(arg)), arg)
            packed, since = b"\r\n", at + 1
    return [*pieces, packed + _pack_some(args[since:])]


def _pack_some(args: Sequence[Arg]) -> bytes:
    """Encode some arguments of a command, without the line that counts them."""
    return pack(tuple(args)).partition(b"\r\n")[2] if args else b""


def head_of(packed: Packed) -> list[bytes]:
    """Return a command's first arguments: at least its name and its keys, none of which contains a line end."""
    return pieces_of(packed)[0][:_HEAD_BYTES].split(b"\r\n")[2::2]


def pieces_of(packed: Packed) -> Sequence[bytes]:
    return (packed,) if isinstance(packed, bytes) else packed
