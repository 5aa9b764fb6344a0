"""Retries: claims whose code raised, and that wait here for their next attempt.

A waiting claim occupies no slot. Its entry stays pending in the name of this replica, so it counts towards
``max_queued_requests`` and is redelivered if the replica dies; `Attempts` keeps the count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...broker.queue.group.attempts import Attempts
from ...broker.registry.records import BackendSpec
from ..claim import Claim
from ..retry import RetryPolicy
from .in_progress import InProgress


class Retries:
    """The claims of one replica that wait for their next attempt. Only for the loop in which it is made.

    Args:
        attempts: records them at the broker.
        in_progress: the claims of the replica.
        config: of the backend.
        now_ms: Unix time in milliseconds by the broker's clock.
    """

    def __init__(
        self, attempts: Attempts, in_progress: InProgress, config: BackendSpec, now_ms: Callable[[], float]
    ) -> None:
        self._attempts, self._in_progress, self._now_ms = attempts, in_progress, now_ms
        self._policy = RetryPolicy(config.retry)
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Claim, asyncio.TimerHandle] = {}

    def apply(self, config: BackendSpec) -> None:
        """Use a changed configuration from now on. Claims that wait keep their time."""
        self._policy = RetryPolicy(config.retry)

    def close(self) -> None:
        """Cancel the timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def next_due_ms(self, claim: Claim) -> int:
        """Return when the next attempt of a claim is due whose code raised; 0 if there is none.

        There is none if the error is not retried, the request was withdrawn, its attempts are exhausted, or the next
        one would begin after its deadline.
        """
        wish, deadline_ms = claim.retry, claim.entry.header.deadline_ms
        if wish is None or claim.is_withdrawn or claim.is_streaming:
            return 0
        delay_s = self._policy.delay_s(claim.entry.attempts + 1, wish)
        if delay_s is None:
            return 0
        due_ms = int(self._now_ms() + delay_s * 1000)
        return 0 if deadline_ms and due_ms >= deadline_ms else due_ms

    def begin(self, claim: Claim, due_ms: int) -> None:
        """Record that the code of a claim raised, and that its next attempt is due at ``due_ms``."""
        entry = claim.entry
        entry.attempts, entry.due_ms = entry.attempts + 1, due_ms
        self._attempts.record(claim.ref, entry.attempts, due_ms)
        claim.running = claim.retry = claim.quarantine_ended = None
        if entry.large:
            entry.body = b""  # it is fetched again

    def wait(self, claim: Claim, on_due: Callable[[Claim], None]) -> None:
        """Let a claim wait until it is due, then pass it to ``on_due``. It occupies no slot meanwhile."""
        self._in_progress.delayed.add(claim)
        delay_s = max(0.0, claim.entry.due_ms - self._now_ms()) / 1000
        self._timers[claim] = self._loop.call_later(delay_s, self._end_wait, claim, on_due)

    def cancel(self, claim: Claim) -> bool:
        """End the wait of a claim, and return whether it waited."""
        if (timer := self._timers.pop(claim, None)) is None:
            return False
        timer.cancel()
        self._in_progress.delayed.discard(claim)
        return True

    def cancel_all(self) -> list[Claim]:
        """End the wait of all claims, and return them."""
        return [claim for claim in list(self._timers) if self.cancel(claim)]

    def forget(self, claim: Claim) -> None:
        """Delete the record of the attempts of a claim that is settled."""
        if claim.entry.attempts:
            self._attempts.forget(claim.ref)

    def _end_wait(self, claim: Claim, on_due: Callable[[Claim], None]) -> None:
        del self._timers[claim]
        self._in_progress.delayed.discard(claim)
        claim.entry.due_ms = 0
        self._attempts.record(claim.ref, claim.entry.attempts, 0)
        on_due(claim)
