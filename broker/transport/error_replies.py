"""Error replies of the server: their classification, and the errors that callers see for them.

A command that was refused for a temporary reason, or by a server that is not the primary, was not carried out. It is
safe to send it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import monotonic

from ..errors import NO_CLUSTER, BrokerFull, BrokerRefused, NotPermitted, StringTooLong
from ..wire._fields import LARGEST
from ..wire.keys import PREFIX, shown_key
from .dial import user_of
from .url import shown_url

TEMPORARY = frozenset({"BUSY", "CLUSTERDOWN", "LOADING", "MISCONF", "NOREPLICAS", "OOM", "TRYAGAIN"})
"""First words of the error replies of a server that will accept the command later."""

NOT_PRIMARY = frozenset({"MASTERDOWN", "READONLY", "UNBLOCKED"})
"""First words of the error replies of a demoted server: the address may lead to the new primary by now."""

MEMORY = "OOM"

_ERRORS: dict[str, type[BrokerRefused]] = {"NOPERM": NotPermitted, MEMORY: BrokerFull}
_DENIED_IN_SCRIPT = ("ERR The user executing the script can't", "ERR ACL failure in script")
"""Errors in place of ``NOPERM`` for a command inside a script: up to Redis 7.0, and of later versions."""
_CLUSTER = frozenset({"ASK", "CROSSSLOT", "MOVED"})
"""First words of the error replies of a cluster's node that did not show its mode in the handshake."""
_TOO_LONG = "ERR Protocol error: invalid bulk length"
_TOO_LONG_TTL_S = 60.0
"""How long the length of a string that the server refused counts as too long."""


class ErrorReply(Exception):
    """An error reply as it was received. `error_of` converts it to the error that callers see."""

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def code(self) -> str:
        return self.message.partition(" ")[0]

    @property
    def lacks_script(self) -> bool:
        return self.message.startswith("NOSCRIPT ")


def error_of(message: str, command: Sequence[bytes], url: str) -> BrokerRefused:
    """Return the error for an error reply ``message`` to ``command``, of the broker at ``url``."""
    code, _, rest = message.partition(" ")
    kind = _ERRORS.get(code)
    if message.startswith(_DENIED_IN_SCRIPT):
        kind = NotPermitted
    elif message == _TOO_LONG:
        kind = StringTooLong
    shown_message = message if kind is None else rest
    if code in _CLUSTER:
        shown_message = f"{message}: it is a node of a cluster. {NO_CLUSTER}"
    return (kind or BrokerRefused)(shown_message, _describe(command), shown_url(url), user_of(url))


def _describe(command: Sequence[bytes]) -> str:
    """Return a command's name and its keys, without the secrets that they contain."""
    name = command[0].decode("ascii", "replace")
    if name in ("EVAL", "EVALSHA"):
        keys = command[3 : 3 + int(command[2])]
    else:
        keys = [arg for arg in command[1:] if arg.startswith(PREFIX.encode())][:1]
    return " ".join([name, *(shown_key(key.decode("utf-8", "replace")) for key in keys)])


class StringLimit:
    """The largest known number of bytes that the server accepts as one string.

    A server with a lower ``proto-max-bulk-len`` refuses a longer string and closes the connection. Other commands
    survive that, as they survive any lost connection, but it should not happen for each long string. A limit that was
    found is forgotten after a minute, as the server's setting may have changed.
    """

    def __init__(self) -> None:
        self._refused_bytes, self._refused_at_s = 0, -math.inf

    @property
    def largest(self) -> int:
        is_known = monotonic() - self._refused_at_s < _TOO_LONG_TTL_S
        return self._refused_bytes - 1 if is_known else LARGEST

    def refused(self, size_bytes: int) -> None:
        """Note that the server refused a string of this size."""
        self._refused_bytes, self._refused_at_s = size_bytes, monotonic()
