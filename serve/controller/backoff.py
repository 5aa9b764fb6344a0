"""Backoff of restarts: when a version of a backend, or a proxy, that failed may be started again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_RETRY_S = 0.5
"""Delay before the first retry; it doubles with each further failure."""

MAX_RETRY_S = 30.0
"""Longest delay for a version of which no replica was ever ready."""

MAX_PROVEN_RETRY_S = 2.0
"""Longest delay for a version of which a replica was ready once.

Its callers wait, and the cause of its deaths may be a node or a single request.
"""

STEADY_AFTER_S = 5.0
"""A process that was ready this long is replaced at once when it dies, however often that happens.

Its start is not the cause, and because each such process lives at least this long, restarts stay rare.
"""

FORGIVEN_AFTER_S = 60.0
"""Without a failure for this long, the next one counts as the first."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Recent failures of one version of a backend, or of one proxy: to start, or soon after the start."""

    count: int = 0
    last_s: float = 0.0
    """Time of the last failure, on the clock of ``ObservedState.now_s``."""

    def plus_one(self, now_s: float, *, ready_s: float = 0.0) -> Failures:
        """Return the failures with one more, of a process that was ready for ``ready_s`` seconds."""
        if ready_s >= STEADY_AFTER_S:
            return self
        return Failures(1 if self.is_forgiven(now_s) else self.count + 1, now_s)

    def is_forgiven(self, now_s: float) -> bool:
        return self.count == 0 or now_s - self.last_s > FORGIVEN_AFTER_S

    def allows_start(self, now_s: float, *, proven: bool) -> bool:
        """Return whether the delay after the last failure is over.

        Args:
            now_s: the present time.
            proven: whether one was ready at some time. Its first failure causes no delay.
        """
        retries = self.count - 1 if proven else self.count
        if retries <= 0 or self.is_forgiven(now_s):
            return True
        longest_s = MAX_PROVEN_RETRY_S if proven else MAX_RETRY_S
        return now_s >= self.last_s + min(FIRST_RETRY_S * 2.0 ** min(retries - 1, 10), longest_s)


NO_FAILURES = Failures()
