"""Commands that wait for the end of an outage, in the order in which they are to be sent.

The time limit counts from the start of the outage, not for each command: when the outage has lasted ``patience_s``, the
waiting commands fail, and later ones fail at once, until it ends. Patient commands wait without a limit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from .commands import Command


class WaitingCommands(deque[Command]):
    """The waiting commands of one connection. ``fail`` is called in the loop for each that may wait no longer.

    The deque itself holds the commands that were sent before, and refused or lost with the connection. The connection
    checks it for each command, so the check is that of a deque. Commands that were not sent yet wait only behind these,
    or while there is no connection.
    """

    def __init__(self, fail: Callable[[Command], None]) -> None:
        super().__init__()
        self._fail = fail
        self._unsent: deque[Command] = deque()
        """Commands not sent yet. They stay behind the others, of which more may come while replies are outstanding."""
        self._began_s: float | None = None
        self._patience_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def any(self) -> bool:
        """Whether any command waits, sent or not."""
        return bool(self or self._unsent)

    def begin_outage(self, patience_s: float) -> None:
        """Start the time limit, unless an outage has begun already."""
        if self._began_s is None:
            loop = asyncio.get_running_loop()
            self._began_s, self._patience_s = loop.time(), patience_s
            self._timer = loop.call_later(patience_s, self._fail_impatient)

    @property
    def outage_s(self) -> float:
        """Seconds since the outage began; 0 if there is none."""
        return 0.0 if self._began_s is None else asyncio.get_running_loop().time() - self._began_s

    def end_outage(self) -> None:
        self._began_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add_sent(self, commands: Iterable[Command]) -> None:
        """Add commands that were sent, ahead of the unsent ones; fail those for which the time limit has passed."""
        self._add(commands, self)

    def add_unsent(self, command: Command) -> None:
        """Add a command behind all others; fail it in the next tick of the loop if the time limit has passed."""
        self._add([command], self._unsent)

    def _add(self, commands: Iterable[Command], to: deque[Command]) -> None:
        for command in commands:
            if not command.patient and self._is_limit_over():
                asyncio.get_running_loop().call_soon(self._fail, command)
            else:
                to.append(command)

    def pop_all(self) -> list[Command]:
        """Remove and return all commands, in order."""
        commands = [*self, *self._unsent]
        self.clear()
        self._unsent.clear()
        return commands

    def _is_limit_over(self) -> bool:
        return self._began_s is not None and asyncio.get_running_loop().time() >= self._began_s + self._patience_s

    def _fail_impatient(self) -> None:
        self._timer = None
        waiting = self.pop_all()
        self.extend(command for command in waiting if command.patient)
        for command in waiting:
            if not command.patient:
                self._fail(command)
