"""A steady load of calls, and its outcome."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from tests.support.waiting import wait_until

_PAUSE_S = 0.02
"""Of each thread after each call: without it, a load takes the whole machine from what the test waits for."""


class Load:
    """Calls that a few threads send one after the other, with short pauses."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._ended = threading.Event()
        self._sending = threading.Lock()
        self.sent = 0
        self.answers: list[tuple[float, Any]] = []
        """The time (monotonic) and the result of each call."""
        self.failures: list[Exception] = []

    def run(self) -> None:
        while not self._ended.is_set():
            sent_s = time.monotonic()
            with self._sending:
                self.sent += 1
            try:
                self.answers.append((sent_s, self._call()))
            except Exception as e:
                self.failures.append(e)
            self._ended.wait(_PAUSE_S)

    def end(self) -> None:
        self._ended.set()

    def goes_on(self) -> None:
        """Wait for some more results."""
        enough = len(self.answers) + 20
        wait_until(lambda: len(self.answers) >= enough or self.failures)

    def since(self, moment_s: float) -> Counter[Any]:
        """Return the results of the calls that were sent after ``moment_s``, counted."""
        return Counter(answer for sent_s, answer in self.answers if sent_s >= moment_s)


@contextmanager
def load(call: Callable[[], Any], threads: int = 4) -> Generator[Load]:
    """Call steadily; at the end, no call may have failed."""
    load = Load(call)
    running = [threading.Thread(target=load.run, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        load.goes_on()
        yield load
        load.goes_on()
    finally:
        load.end()
        for thread in running:
            thread.join(60)
    failed = len(load.failures)
    assert not failed, f"{failed} of {failed + len(load.answers)} calls failed, the first ones: {load.failures[:3]!r}"
