"""Reconciliation: one pass compares the desired with the observed state and carries out the planner's steps."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any

from ...broker.errors import PenstockError
from ...broker.queue.purge import purge_backend
from ...broker.registry.records import BackendRecord, Snapshot
from ...broker.registry.reports import ControllerReport, ProxyReport, ReplicaReport
from ...broker.registry.store import Registry
from ...broker.transport.connection import RedisConnection
from ...broker.wire.keys import Keys
from ...handles.errors import BackendNotFound, to_wire
from ...proxy.options import ProxyOptions
from ...workers.runtime_env import for_ray
from ..ray_actors.proxy import ProxyActor
from ..ray_actors.replica import RemoteReplica
from ..settings import ProcessArguments, Settings
from . import planner
from .actors import ActorPool, options_of_proxy
from .observed_state import StateObserver
from .planner import Step, plan
from .scaler import Scaler
from .state import DesiredProxies

_CHECK_PROXIES_EVERY_S = 5.0
_PROXY_CHECK_TIMEOUT_S = 5.0
_PROXY_DRAIN_S = 2.0
"""Seconds that a proxy may take to drain when the instance ends."""
_LATE_PUBLISH_S = 2.0
"""Publishers follow the registry within a second, so none publishes to a deleted backend after this time."""


class Reconciler:
    """Starts, ends and checks the replicas and proxies of one instance.

    Args:
        connection: an open connection to the broker.
        registry: of the instance, on that connection.
        keys: of the instance.
        replicas: the actors of all replicas.
        proxies: the actors of all proxies.
        http: the options of all proxies, as fields of ``HTTPOptions``.
        arguments: the broker and the variables of replicas and proxies.
    """

    def __init__(
        self,
        connection: RedisConnection,
        registry: Registry,
        keys: Keys,
        replicas: ActorPool,
        proxies: ActorPool,
        *,
        http: Mapping[str, Any],
        arguments: ProcessArguments,
    ) -> None:
        self._connection, self._registry, self._keys = connection, registry, keys
        self._replicas, self._proxies = replicas, proxies
        self._http, self._limits = dict(http), ProxyOptions.from_fields(http)
        self._arguments = arguments
        self._observer = StateObserver(registry, replicas, proxies)
        self._scaler = Scaler(connection, keys)
        self._http_ready = asyncio.Event()
        self._http_error: PenstockError | None = None
        self._reports_head_as_away = True
        """Whether the registry may hold a report that Ray's head is away, perhaps one of an earlier controller."""
        self._late_purges: set[asyncio.Task[None]] = set()

    async def restore(self) -> None:
        """Read what an earlier controller reported. Raises `BrokerUnavailable`."""
        await self._observer.restore()

    async def http_ready(self) -> None:
        """Return when every desired proxy serves.

        Raises:
            PenstockError: a proxy failed.
        """
        await self._http_ready.wait()
        if self._http_error is not None:
            raise self._http_error

    async def run_pass(self, settings: Settings, snapshot: Snapshot) -> None:
        """Bring the instance one step closer to ``snapshot``. Does nothing while Ray's head does not answer.

        Raises:
            BrokerUnavailable: the pass is incomplete; the next one repeats what is missing.
        """
        observer = self._observer
        await observer.observe()
        await self._report_head(observer.head_answers)
        if not observer.head_answers:
            return
        desired = await self._scaler.scale(
            observer.desired(snapshot, settings),
            snapshot,
            statuses=observer.statuses,
            replica_reports=observer.replica_reports(),
            rolled_out=observer.rolled_out,
        )
        for step in plan(desired, observer.observed()):
            await self._carry_out(step, snapshot)
        self._check_health(snapshot)
        await observer.report_statuses(desired)
        self._update_http_ready(desired.http)

    async def _report_head(self, answers: bool) -> None:
        if not answers:
            await self._registry.put_report("controller", ControllerReport(waits_for="Ray's head"))
        elif self._reports_head_as_away:
            await self._registry.delete_report(ControllerReport, "controller")
        self._reports_head_as_away = not answers

    # -- steps

    async def _carry_out(self, step: Step, snapshot: Snapshot) -> None:
        match step:
            case planner.StartReplica(tag, _):
                await self._start_replica(snapshot.backends[tag])
            case planner.DrainReplica(name, grace_s):
                self._replicas.drain(name, grace_s)
            case planner.KillReplica(name):
                self._replicas.kill(name)
            case planner.ForgetReplica(name):
                await self._forget_replica(name)
            case planner.PurgeBackend(tag):
                await self._purge_backend(tag)
            case planner.StartProxy(name, node, port):
                await self._start_proxy(name, node, port)
            case planner.DrainProxy(name, within_s):
                delay_s = min(self._limits.drain_delay_s, max(within_s, 0.0) / 4)
                timeout_s = min(self._limits.request_timeout_s, max(within_s - delay_s, 0.0))
                self._proxies.drain(name, timeout_s, delay_s)
            case planner.KillProxy(name):
                self._proxies.kill(name)
            case planner.ForgetProxy(name):
                await self._forget_proxy(name)

    async def _start_replica(self, record: BackendRecord) -> None:
        name = f"{record.tag}#{secrets.token_hex(3)}"
        # Written before the actor exists, so that a restarted controller knows about it.
        report = ReplicaReport(backend=record.tag, version=record.version, initial_config_version=record.config_version)
        await self._registry.put_report(name, report)
        self._observer.note_replica(name, report)
        # Spread over the nodes, so that the death of one takes a share of each backend and not all of one.
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD", **record.actor_options}
        if record.runtime_env is not None:
            options["runtime_env"] = for_ray(record.runtime_env)
        args = (self._arguments.replica_redis_url, self._keys.instance, record.tag, name, self._arguments.environment)
        self._replicas.start(name, RemoteReplica, args, options)

    async def _forget_replica(self, name: str) -> None:
        await self._registry.drop_lease(self._observer.backend_of(name), name)
        await self._registry.delete_report(ReplicaReport, name)
        self._observer.forget_replica(name)

    async def _purge_backend(self, tag: str) -> None:
        """Refuse the requests of a deleted backend, now and once more for publishers that had not noticed yet."""
        error = BackendNotFound(tag, (await self._registry.snapshot()).backends)
        await purge_backend(self._connection, self._keys, tag, error.status, to_wire(error))
        await self._observer.forget_backend(tag)

        async def purge_late_requests() -> None:
            await asyncio.sleep(_LATE_PUBLISH_S)
            if tag not in (await self._registry.snapshot()).backends:
                await purge_backend(self._connection, self._keys, tag, error.status, to_wire(error))

        task = asyncio.get_running_loop().create_task(purge_late_requests())
        self._late_purges.add(task)
        task.add_done_callback(self._late_purges.discard)

    async def _start_proxy(self, name: str, node: str, port: int) -> None:
        report = ProxyReport(node=node)
        await self._registry.put_report(name, report)
        self._observer.note_proxy(name, report)
        args = self._arguments.for_proxy(name, self._http | {"port": port})
        self._proxies.start(name, ProxyActor, args, options_of_proxy(node))

    async def _forget_proxy(self, name: str) -> None:
        await self._registry.delete_report(ProxyReport, name)
        self._observer.forget_proxy(name)

    # -- health

    def _check_health(self, snapshot: Snapshot) -> None:
        now_s = time.monotonic()
        for name, member in self._replicas.members.items():
            record = snapshot.backends.get(self._observer.backend_of(name))
            if record is not None and member.ready and not member.ending:
                config = record.config
                if now_s - member.checked_at_s >= config.health_check_period_s:
                    self._replicas.check(name, config.health_check_timeout_s)
        for name, member in self._proxies.members.items():
            if member.ready and not member.ending and now_s - member.checked_at_s >= _CHECK_PROXIES_EVERY_S:
                self._proxies.check(name, _PROXY_CHECK_TIMEOUT_S)

    def _update_http_ready(self, http: DesiredProxies) -> None:
        wanted = len(http.nodes) * http.per_node
        ready = sum(member.ready for member in self._proxies.members.values())
        self._http_error = self._observer.proxy_error
        if ready >= wanted or self._http_error is not None:
            self._http_ready.set()

    # -- the end

    def can_leave(self, node_id: str) -> bool:
        """Return whether the controller should move: its node leaves, nothing else is on it, and another stays."""
        return self._observer.can_leave(node_id)

    async def end_actors(self) -> None:
        """Drain and end every proxy, then every replica: what the proxies accepted can still be answered."""
        await self._proxies.end(_PROXY_DRAIN_S)
        await self._replicas.end(0.0)

    async def delete_reports(self) -> None:
        """Delete the reports of all replicas and proxies. Raises `BrokerUnavailable`."""
        for name in self._replicas.members:
            await self._registry.delete_report(ReplicaReport, name)
        for name in self._proxies.members:
            await self._registry.delete_report(ProxyReport, name)
