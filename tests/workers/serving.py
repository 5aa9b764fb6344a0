"""Replicas to test with: in this process, or in one of their own that can be killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, cast

from redis.asyncio import Redis

from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Header
from penstock.handles.calls.call import Call, CallOutcome
from penstock.handles.calls.request_client import RequestClient
from penstock.workers.asgi.application import AsgiApplication
from penstock.workers.executing import user_code
from penstock.workers.executing.runner import Runner
from penstock.workers.replica import Replica
from penstock.workers.retry import Retry
from tests.support.forks import shared_forks

TAG = "model"
CONFIG: dict[str, Any] = {"max_queued_requests": 10_000, "max_deliveries": 3}

RETRY_AFTER_S = 8.0
"""When `fail_for_now` wants to be called again: long enough for a test to kill its replica before."""

_numbers = itertools.count(1)


@asynccontextmanager
async def serving(url: str, function: Callable[..., Any], *, tag: str = TAG, **config: Any) -> AsyncGenerator[Replica]:
    """A replica of the backend ``tag`` in this loop."""
    replica = f"{tag}#{next(_numbers)}"
    code = user_code.dump(cast("Any", ByReference(function)))
    runner = await Runner.start(tag, replica, code, BackendSpec(**{**CONFIG, **config}))
    worker = Replica(url, "default", tag, replica, runner)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.drain(5.0)
        await worker.stop()
        await runner.stop()


@asynccontextmanager
async def declared(url: str) -> AsyncGenerator[None]:
    """Declare the backend `TAG` and the endpoint ``echo`` (``POST /echo``) in the registry."""
    connection = await RedisConnection(url).open()
    backend = BackendRecord(tag=TAG, version="1", code="", config=BackendSpec(**CONFIG))
    endpoint = EndpointRecord(name="echo", route="/echo", methods=("POST",), traffic={TAG: 1.0})
    await Registry(connection, Keys("default")).change(lambda seen: Change({TAG: backend}, {"echo": endpoint}))
    try:
        yield
    finally:
        await Registry(connection, Keys("default")).erase()
        await connection.close()


class ByReference:
    """Code of a test that is not copied: it shares the objects that it closes over with the runner."""

    functions: ClassVar[dict[int, Any]] = {}

    def __init__(self, function: Any) -> None:
        self.functions[id(function)] = function
        self._key = id(function)

    def __call__(self) -> None: ...

    def __reduce__(self) -> Any:
        return _same, (self._key,)


def by_reference(target: Callable[..., Any] | AsgiApplication) -> Callable[..., Any] | AsgiApplication:
    """Return code of a test that is not copied, be it an application or other code."""
    if isinstance(target, AsgiApplication):
        return AsgiApplication(ByReference(target.target))
    return ByReference(target)


def _same(key: int) -> Any:
    return ByReference.functions[key]


class Killable:
    """A replica in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, pid: int) -> None:
        self._process, self._pid = process, pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def kill(self) -> None:
        if self.alive:
            os.kill(self._pid, signal.SIGKILL)
        await self._process.wait()

    async def ended(self) -> None:
        await self._process.wait()


async def start_killable(url: str, function: str) -> Killable:
    """Start a replica that runs ``function`` of this module, and return when it claims."""
    python = shared_forks("penstock.workers.replica", "penstock.workers.asgi.application").python
    process = await asyncio.create_subprocess_exec(python, __file__, url, function, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    ready, pid = (await process.stdout.readline()).split()
    assert ready == b"ready"
    return Killable(process, int(pid))


class Client:
    """A caller of the backend `TAG`."""

    def __init__(self, caller: RequestClient, redis: Redis) -> None:
        self.caller, self.redis = caller, redis

    def call(self, body: bytes = b"", **options: Any) -> tuple[Call, asyncio.Future[Reply]]:
        """Send a request; return it, and the future of its reply or error."""
        timeout_s, batch = options.pop("timeout_s", None), options.pop("batch", False)
        backend = BackendRecord(
            tag=TAG, version="1", code="", config=BackendSpec(**{**CONFIG, **options.pop("config", {})})
        )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def then(outcome: CallOutcome) -> None:
            if isinstance(outcome, Reply):
                future.set_result(outcome)
            else:
                assert isinstance(outcome, BaseException), "parts were not asked for"
                future.set_exception(outcome)

        header = Header(codec="bytes", **options)
        return self.caller.send(backend, header, body, then, timeout_s=timeout_s, batch=batch), future

    async def ask(self, body: bytes = b"", **options: Any) -> Reply:
        return await self.call(body, **options)[1]

    async def claimed(self) -> int:
        """Return how many requests replicas have claimed."""
        keys = self.caller.keys
        pending = [await self.redis.xpending(key, "replicas") for key in (keys.requests(TAG), keys.batch(TAG))]
        return sum(int(one["pending"]) for one in pending)

    async def dead(self) -> int:
        """Return how many dead letters there are."""
        return int(await self.redis.xlen(self.caller.keys.dead(TAG)))

    async def depth(self) -> int:
        """Return how many requests are unsettled."""
        keys = self.caller.keys
        return int(await self.redis.xlen(keys.requests(TAG))) + int(await self.redis.xlen(keys.batch(TAG)))


@asynccontextmanager
async def calling(url: str) -> AsyncGenerator[Client]:
    caller = RequestClient(url, "default")
    await caller.open()
    async with Redis.from_url(url) as redis:
        try:
            yield Client(caller, redis)
        finally:
            # The streams belong to a backend, and no backend is deleted here.
            keys = caller.keys
            await redis.delete(keys.requests(TAG), keys.batch(TAG), keys.dead(TAG), keys.done(TAG))
            await caller.close()


# -- backends of killable replicas


def who(request: Any) -> bytes:
    """Return the process id, or end the process if the body says so."""
    if request.data == b"die":
        os._exit(1)
    return str(os.getpid()).encode()


async def slowly(request: Any) -> bytes:
    """`who` after a pause."""
    if request.data == b"die":
        await asyncio.sleep(0.2)
        os._exit(1)
    await asyncio.sleep(0.3)
    return str(os.getpid()).encode()


async def never(request: Any) -> bytes:
    await asyncio.sleep(3600)
    return b""


async def tick(request: Any) -> AsyncGenerator[str]:
    for n in itertools.count():
        yield str(n)
        await asyncio.sleep(0.01)


def fail_for_now(request: Any) -> None:
    raise Retry(after_s=RETRY_AFTER_S)


async def _main(url: str, name: str) -> None:
    function = globals()[name]
    replica = f"{TAG}#p{os.getpid()}"
    runner = await Runner.start(TAG, replica, user_code.dump(function), BackendSpec(**CONFIG))
    await Replica(url, "default", TAG, replica, runner).start()
    print("ready", os.getpid(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
