"""The state of an instance as its broker has it: stats of backends, reports of processes and jobs, its memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from ...broker.errors import BrokerRefused
from ...broker.queue.stats import BackendStats
from ...broker.registry.reports import BackendStatus, ControllerReport, JobReport, ProxyReport, ReplicaReport
from ...broker.results.counts import read_kept_counts
from ...broker.transport.commands import Script
from ...handles.calls.request_client import RequestClient

ControllerState = Literal["alive", "away", "waiting for Ray's head"]

_OWNER_S = 600
"""A proxy that was not scraped for this long no longer exposes the metrics of the instance."""

# Makes a proxy the owner of an instance's metrics, unless another one is. KEYS: the owner. ARGV: the proxy's group and
# name, the beginning of the keys of the proxies' leases, the expiry in seconds. The owner is a group of proxies, those
# that share a port, and the name of the one that was asked last: if that has died, another group may take over.
_OWN = Script("""#!lua
local group, name = string.match(redis.call('GET', KEYS[1]) or '', '^(.*)\\n(.*)$')
if group and group ~= ARGV[1] and redis.call('GET', ARGV[3] .. name) then return 0 end
redis.call('SET', KEYS[1], ARGV[1] .. '\\n' .. ARGV[2], 'EX', ARGV[4])
return 1
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceState:
    """One reading of the state of an instance."""

    stats: dict[str, BackendStats]
    statuses: dict[str, BackendStatus]
    replicas: dict[str, ReplicaReport]
    proxies: dict[str, ProxyReport]
    jobs: dict[str, JobReport]
    kept: dict[str, dict[str, dict[str, int]]]
    """The numbers of kept requests, by backend, endpoint and state."""
    controller: ControllerState
    memory_bytes: int | None
    """The memory that the broker uses; None if its user may not ask."""
    memory_limit_bytes: int | None
    """The broker's memory limit; 0 if it has none."""


async def read_instance(caller: RequestClient) -> InstanceState:
    """Read the state of the instance of ``caller``.

    Raises:
        BrokerUnavailable: Redis cannot be reached.
        BrokerRefused: Redis refused a command.
    """
    registry, connection = caller.registry, caller.connection
    (stats, kept), statuses, replicas, proxies, (controllers, jobs), (has_owner, memory) = await asyncio.gather(
        _read_backends(caller),
        registry.get_reports(BackendStatus),
        registry.get_reports(ReplicaReport),
        registry.get_reports(ProxyReport),
        asyncio.gather(registry.get_reports(ControllerReport), registry.get_jobs()),
        asyncio.gather(connection.send("EXISTS", caller.keys.owner, repeat=True), _read_memory(caller)),
    )
    controller: ControllerState = "alive" if has_owner else "away"
    if has_owner and any(report.waits_for for report in controllers.values()):
        controller = "waiting for Ray's head"
    return InstanceState(
        stats=stats,
        statuses={tag: status for tag, status in statuses.items() if tag in stats},
        replicas=replicas,
        proxies=proxies,
        jobs=jobs,
        kept=kept,
        controller=controller,
        memory_bytes=memory.get("used_memory"),
        memory_limit_bytes=memory.get("maxmemory"),
    )


async def owns_metrics(caller: RequestClient, proxy: str, group: str) -> bool:
    """Return whether the proxies of ``group`` expose the metrics of the instance, of which ``proxy`` is one.

    The group that is asked first does, while one of its proxies lives and is asked now and then.
    """
    args = (group, proxy, caller.keys.proxy_alive(""), _OWNER_S)
    return bool(await caller.connection.run_script(_OWN, [caller.keys.metrics_owner], args, repeat=True))


async def _read_backends(caller: RequestClient) -> tuple[dict[str, BackendStats], dict[str, dict[str, dict[str, int]]]]:
    stats = await caller.backend_stats()
    kept = await asyncio.gather(
        *[
            read_kept_counts(caller.connection, caller.keys, tag, unsettled=one.queued + one.in_progress)
            for tag, one in stats.items()
        ]
    )
    return stats, dict(zip(stats, kept, strict=True))


async def _read_memory(caller: RequestClient) -> dict[str, int]:
    try:
        text: bytes = await caller.connection.send("INFO", "memory", repeat=True)
    except BrokerRefused:
        return {}
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: int(value) for name, _, value in pairs if name in ("used_memory", "maxmemory")}
