"""Commands that wait for the end of an outage, in the order in which they are to be sent.

Patience belongs to the outage and not to each command: once an outage has lasted for as long as commands may wait, the
waiting ones fail, and later ones fail at once, until it is over. Patient commands wait for as long as it takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from .commands import Command


class WaitingCommands(deque[Command]):
    """The waiting commands of one connection. ``fail`` gets each that may not wait any longer, in the loop.

    The deque itself holds those that were sent: refused, or lost with the connection. A connection looks at it for each
    command. Commands that were not sent wait only behind such commands, or while there is no connection.
    """

    def __init__(self, fail: Callable[[Command], None]) -> None:
        super().__init__()
        self._fail = fail
        self._unsent: deque[Command] = deque()
        """Those that came later. Commands that were sent before them may still be answered with a refusal."""
        self._began_s: float | None = None
        self._patience_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def any(self) -> bool:
        """Whether any command waits, sent or not."""
        return bool(self or self._unsent)

    def begin_outage(self, patience_s: float) -> None:
        """Count the patience from now on, unless an outage is being counted already."""
        if self._began_s is None:
            loop = asyncio.get_running_loop()
            self._began_s, self._patience_s = loop.time(), patience_s
            self._timer = loop.call_later(patience_s, self._give_up)

    def end_outage(self) -> None:
        self._began_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add_sent(self, commands: Iterable[Command]) -> None:
        """Let commands wait that were sent before those that were not; fail those that may not wait."""
        self._add(commands, self)

    def add_unsent(self, command: Command) -> None:
        """Let a command wait behind all others; fail it in the loop's next turn if it may not."""
        self._add([command], self._unsent)

    def _add(self, commands: Iterable[Command], to: deque[Command]) -> None:
        for command in commands:
            if not command.patient and self._is_too_late():
                asyncio.get_running_loop().call_soon(self._fail, command)
            else:
                to.append(command)

    def take(self) -> list[Command]:
        """Return all of them; none waits any more."""
        taken = [*self, *self._unsent]
        self.clear()
        self._unsent.clear()
        return taken

    def _is_too_late(self) -> bool:
        return self._began_s is not None and asyncio.get_running_loop().time() >= self._began_s + self._patience_s

    def _give_up(self) -> None:
        self._timer = None
        waiting = self.take()
        self.extend(command for command in waiting if command.patient)
        for command in waiting:
            if not command.patient:
                self._fail(command)
