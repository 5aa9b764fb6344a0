"""Write probe: finds out whether a server accepts writes, and when it accepts them again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import monotonic
from typing import Any

from ..errors import BrokerUnavailable
from .commands import Command, Script, pack

WRITE_PROBE = Script("""#!lua flags=allow-oom
return 1
""")
"""A script that writes nothing and is refused whenever writes are. It needs no key, and only the right to run scripts.

`ROLE` would need a right that the users of docs/security.md do not have, and does not show the other reasons.
"""

_BACKOFF_S = (0.05, 0.5)
"""First and longest pause between probes of a server that refuses writes."""
_SAME_REFUSAL_S = 1.0
"""Writes that are refused sooner than this after they were accepted again continue the backoff of the last refusal."""


class WriteProbe:
    """The state of a server: whether it accepts writes. While it refuses them, probes it with backoff.

    Args:
        send: sends a probe.
        on_accepted: called when a probe finds that the server accepts writes again.
    """

    def __init__(self, send: Callable[[Command], None], on_accepted: Callable[[], None]) -> None:
        self._send, self._on_accepted = send, on_accepted
        self.refusal = ""
        """The error reply with which the server refuses writes; empty while it accepts them."""
        self._accepted_at_s = -math.inf
        self._backoff_s = _BACKOFF_S[0]
        self._is_in_flight = False
        self._timer: asyncio.TimerHandle | None = None

    def refused(self, message: str) -> None:
        """Note that the server refuses writes, and schedule the next probe."""
        if not self.refusal and monotonic() - self._accepted_at_s >= _SAME_REFUSAL_S:
            self._backoff_s = _BACKOFF_S[0]
        self.refusal = message
        if self._timer is None and not self._is_in_flight:
            self._timer = asyncio.get_running_loop().call_later(self._backoff_s, self._probe)
            self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])

    def accepted(self) -> None:
        """Note that the server accepts writes."""
        self.refusal = ""
        self._accepted_at_s = monotonic()

    def probe(self) -> None:
        """Send a probe, unless one is in flight or scheduled."""
        if self._timer is None and not self._is_in_flight:
            self._probe()

    def cancel(self) -> None:
        """Forget the probe that is in flight or scheduled: the connection is lost."""
        self._is_in_flight = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _probe(self) -> None:
        self._timer = None
        self._is_in_flight = True
        packed = pack(("EVAL", WRITE_PROBE.text, 0))
        self._send(Command(packed, self._on_reply, repeat=False, pack_whole=None, prompt=True))

    def _on_reply(self, result: Any) -> None:
        if not self._is_in_flight:
            return  # it was cancelled
        self._is_in_flight = False
        if isinstance(result, BrokerUnavailable):
            self.refused(self.refusal)  # and probe again
        elif self.refusal:
            self._on_accepted()
