"""Settings of a consumer: a backend's configuration as it applies to one replica."""

from __future__ import annotations

from dataclasses import dataclass

from ..executing.runner import Runner


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """The settings of one consumer. A changed configuration makes new ones."""

    concurrency: int
    """Calls of user code that run at a time, each of one request or of a batch."""
    is_blocking: bool
    """Whether user code runs on threads."""
    batch_size: int
    """Most requests in one call; 0 where user code takes one request at a time."""
    batch_wait_s: float
    batch_share: float
    max_deliveries: int
    max_dead_letters: int

    @property
    def capacity(self) -> int:
        """The number of requests that run at a time when all slots are occupied."""
        return self.concurrency * max(1, self.batch_size)

    @classmethod
    def of(cls, runner: Runner) -> ConsumerSettings:
        """Return the settings for a runner with its present configuration."""
        config = runner.config
        return cls(
            concurrency=runner.concurrency(),
            is_blocking=runner.is_blocking,
            batch_size=(config.max_batch_size or 1) if runner.accepts_batch else 0,
            batch_wait_s=config.batch_wait_timeout,
            batch_share=config.batch_share,
            max_deliveries=config.max_deliveries,
            max_dead_letters=config.max_dead_letters,
        )
