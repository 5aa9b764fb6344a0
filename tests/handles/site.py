"""Backends to call: real workers on a real broker, in a thread of their own."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.registry.reports import ReplicaReport
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.handles import AsyncServeHandle, ServeHandle
from penstock.handles.calls.shared_client import SharedClient
from penstock.workers.asgi.application import AsgiApplication
from penstock.workers.executing import user_code
from penstock.workers.executing.runner import Runner
from penstock.workers.replica import Replica
from tests.workers.serving import by_reference

T = TypeVar("T")

INSTANCE = "default"
CONFIG: dict[str, Any] = {"max_queued_requests": 10_000, "max_deliveries": 3}


class Lingering:
    """Code that runs until its request is cancelled."""

    def __init__(self) -> None:
        self.running, self.cancelled = threading.Event(), threading.Event()

    async def run(self, request: Any) -> None:
        self.running.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Gate:
    """Code that waits until the test lets it go, and counts its runs.

    Args:
        answer: makes the result of the number of runs so far and the data of the request, which it is by default.
        opens_within_s: how long a run waits before it fails.
    """

    def __init__(
        self, answer: Callable[[int, Any], Any] = lambda run, data: data, *, opens_within_s: float = 20.0
    ) -> None:
        self._answer, self._opens_within_s = answer, opens_within_s
        self.runs: list[Any] = []
        self.is_open = threading.Event()

    def __call__(self, request: Any) -> Any:
        self.runs.append(request.data)
        assert self.is_open.wait(self._opens_within_s)
        return self._answer(len(self.runs), request.data)


class Site:
    """One instance, with the endpoints and workers that a test asks for. Its methods may be called from any thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a failed test that leaves it open does not keep the test run from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="site", daemon=True)
        self._workers: list[tuple[Replica, Runner]] = []
        self._numbers = itertools.count(1)
        self._thread.start()
        try:
            self._connection = self._run(self._open())
        except BaseException:
            self._end()
            raise
        self._keys = Keys(INSTANCE)
        self._registry = Registry(self._connection, self._keys)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop of the site."""
        return self._run(coroutine)

    def change(self, change: Change) -> None:
        """Change the registry."""
        self._run(self._registry.change(lambda seen: change))

    def offer(self, name: str, tag: str, call_methods: tuple[str, ...]) -> None:
        """Restrict an endpoint to some methods of its backend's class."""
        endpoint = EndpointRecord(name=name, traffic={tag: 1.0}, call_methods=call_methods)
        self._run(self._registry.change(lambda seen: Change(endpoints={name: endpoint})))

    def declare(self, name: str = "ask", *, tag: str = "model", route: str | None = None, **config: Any) -> None:
        """Create an endpoint and its backend without replicas."""
        backend = BackendRecord(tag=tag, version="1", code="", config=BackendSpec(**{**CONFIG, **config}))
        endpoint = EndpointRecord(name=name, route=route, traffic={tag: 1.0})
        self._run(self._registry.change(lambda seen: Change({tag: backend}, {name: endpoint})))

    def send_traffic(self, name: str, traffic: dict[str, float], shadows: dict[str, float] | None = None) -> None:
        endpoint = EndpointRecord(name=name, traffic=traffic, shadows=shadows or {})
        self._run(self._registry.change(lambda seen: Change(endpoints={name: endpoint})))

    def serve(
        self, function: Callable[..., Any] | AsgiApplication, name: str = "ask", *, tag: str = "model", **config: Any
    ) -> Replica:
        """Create an endpoint, and a replica in this process: ``function`` can share objects with the test."""
        self.declare(name, tag=tag, **config)
        return self._run(self._start(function, tag, {**CONFIG, **config}))

    def depth(self, tag: str = "model") -> int:
        """Return how many requests are unsettled."""
        return self._run(self._count(tag))

    def batch_depth(self, tag: str = "model") -> int:
        """Return how many batch items are unsettled."""
        return self._run(self._count(tag, batch=True))

    def keys_left(self) -> set[str]:
        """Return all keys but those of the registry, leases, signals, callers and streams."""
        return self._run(self._scan())

    @property
    def replicas(self) -> list[Replica]:
        return [replica for replica, _ in self._workers]

    def close(self) -> None:
        try:
            self._run(self._close())
        finally:
            self._end()

    def abandon(self) -> None:
        """Close the site although its broker is gone."""
        try:
            self._run(self._connection.close())
        finally:
            self._end()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> RedisConnection:
        return await RedisConnection(self.url, name="site").open()

    async def _start(self, function: Callable[..., Any] | AsgiApplication, tag: str, config: dict[str, Any]) -> Replica:
        replica = f"{tag}#{next(self._numbers)}"
        runner = await Runner.start(tag, replica, user_code.dump(by_reference(function)), BackendSpec(**config))
        worker = Replica(self.url, INSTANCE, tag, replica, runner)
        await worker.start()
        await self._registry.put_report(replica, ReplicaReport(backend=tag, state="ready"))
        self._workers.append((worker, runner))
        return worker

    async def _stop(self) -> None:
        while self._workers:
            worker, runner = self._workers.pop()
            await worker.drain(5.0)
            await worker.stop()
            await runner.stop()

    async def _count(self, tag: str, *, batch: bool = False) -> int:
        key = (self._keys.batch if batch else self._keys.requests)(tag)
        # Repeated: the test may just have cut this connection too.
        return int(await self._connection.send("XLEN", key, repeat=True))

    async def _scan(self) -> set[str]:
        scan = ("SCAN", 0, "MATCH", self._keys.pattern, "COUNT", 100_000)
        _, found = await self._connection.send(*scan, repeat=True)
        expected = (":requests", ":requests:batch", ":replies", ":signals", ":calls", ":submitted")
        names = {key.decode() for key in found}
        return {n for n in names if "{registry}" not in n and ":alive:" not in n and not n.endswith(expected)}

    async def _close(self) -> None:
        await self._stop()
        await self._registry.erase()
        await self._connection.close()


# -- code of backends


def echo(request: Any) -> Any:
    return request.data


def describe(request: Any) -> dict[str, Any]:
    return {
        "data": request.data,
        "query": dict(request.query_params),
        "method": request.method,
        "x": request.headers.get("x-test"),
    }


def noting(started: list[Any]) -> Callable[[Any], None]:
    def note(request: Any) -> None:
        started.append(request.data)

    return note


# -- handles


def in_loop(handle: ServeHandle) -> AsyncServeHandle:
    """Return an asyncio handle with the arguments of a sync one."""
    _, arguments = handle.__reduce__()
    return AsyncServeHandle(*arguments)


async def close_here(handle: ServeHandle) -> None:
    _, (url, instance, *_) = handle.__reduce__()
    caller = SharedClient.find(url, instance)
    if caller is not None:
        await caller.close()
