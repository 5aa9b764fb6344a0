"""Reader of an instance's status. Needs Redis, and no other package than the thin installation has."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from ...broker.errors import ConfigError
from ...broker.queue.stats import read_stats
from ...broker.registry.reports import BackendStatus, ControllerReport, ProxyReport, ReplicaReport
from ...broker.registry.store import Registry
from ...broker.results.counts import read_kept_counts, sum_by_endpoint
from ...broker.transport.connection import RedisConnection
from ...broker.transport.url import shown_url
from ...broker.wire.keys import Keys
from ...handles import background_loop
from ...handles.connection import describe_endpoints
from .status import Status, describe_error, describe_refusal
from .warnings import warnings


class StatusReader:
    """Reads the status of the instance that ``keys`` name, over an open connection."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._registry = Registry(connection, keys)

    async def read(self) -> Status:
        """Return the status. Raises `BrokerUnavailable`."""
        registry = self._registry
        proxies = await registry.get_reports(ProxyReport)
        replicas = await registry.get_reports(ReplicaReport)
        backends = {
            tag: await self._describe(tag, status)
            for tag, status in (await registry.get_reports(BackendStatus)).items()
        }
        return Status(
            backends=backends,
            proxies={name: asdict(report) for name, report in proxies.items()},
            controller=await self._controller(),
            warnings=warnings(await registry.get_settings(), proxies.values(), replicas.values()),
            endpoints=describe_endpoints(await registry.snapshot()),
            submitted=await self._submitted(backends),
            jobs=await self._jobs(),
        )

    async def has_owner(self) -> bool:
        """Return whether the ownership of the instance is held, as its controller does."""
        return bool(await self._connection.send("EXISTS", self._keys.owner, repeat=True))

    async def _controller(self) -> str:
        if not await self.has_owner():
            return "away"
        report = (await self._registry.get_reports(ControllerReport)).get("controller")
        return "alive" if report is None else f"waiting for {report.waits_for}"

    async def _submitted(self, backends: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
        return sum_by_endpoint(
            [
                await read_kept_counts(
                    self._connection, self._keys, tag, unsettled=backend["queued"] + backend["in_progress"]
                )
                for tag, backend in backends.items()
            ]
        )

    async def _jobs(self) -> dict[str, dict[str, Any]]:
        now_ms = self._connection.now_ms()
        return {
            name: {**asdict(report), "state": report.state_at(now_ms)}
            for name, report in (await self._registry.get_jobs()).items()
        }

    async def _describe(self, tag: str, status: BackendStatus) -> dict[str, Any]:
        backend_stats = await read_stats(self._connection, self._keys, tag)
        answered = backend_stats.served + backend_stats.failed
        return {
            **asdict(status),
            "failing": describe_error(status.failing),
            "refused": describe_refusal(status.refused),
            "queued": backend_stats.queued,
            "in_progress": backend_stats.in_progress,
            "queued_bytes": backend_stats.queued_bytes,
            "dead_letters": backend_stats.dead_letters,
            "dead_letters_dropped": backend_stats.dead_letters_dropped,
            "served": backend_stats.served,
            "failed": backend_stats.failed,
            "retried": backend_stats.retried,
            "mean_run_ms": round(1000 * backend_stats.run_s / answered, 3) if answered else 0.0,
        }


def no_instance(redis_url: str, instance: str) -> ConfigError:
    """Return the error for an instance that does not exist."""
    return ConfigError(
        f"there is no instance {instance!r} on {shown_url(redis_url)}; serve.start() or `penstock start` starts one"
    )


@contextmanager
def reading_status(redis_url: str, instance: str) -> Generator[Callable[[], Status]]:
    """Connect to an instance until the end of the block. Yields a function that blocks and returns the status.

    Raises:
        ConfigError: ``redis_url`` is not a Redis URL, or there is no such instance.
        BrokerUnavailable: Redis cannot be reached. The function raises this as well.
    """
    connection = background_loop.run(_opened(redis_url))
    try:
        keys = Keys(instance)
        if background_loop.run(Registry(connection, keys).get_settings()) is None:
            raise no_instance(redis_url, instance)
        reader = StatusReader(connection, keys)
        yield partial(_read, reader)
    finally:
        background_loop.run(connection.close())


async def _opened(redis_url: str) -> RedisConnection:
    return await RedisConnection(redis_url, name="penstock-status").open()


def _read(reader: StatusReader) -> Status:
    return background_loop.run(reader.read())
