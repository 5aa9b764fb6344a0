"""Pickled replies: unpickled only if the record of the backend allows it, and never by a proxy."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock import handles
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Part, Reply
from penstock.handles.connection import Connection
from penstock.handles.errors import WireError
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site
from tests.support.waiting import wait_until, wait_until_async

KEYS = Keys(INSTANCE)
Answering = Callable[[str], list[Any]]
"""Returns the reply entries for a call, by its id."""
REFUSED = r"of backend 'model' to request 'call-[0-9a-f]{12}' is pickled, and was not read.*allow_pickle"


class Evil:
    """A value that creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A directory that exists once an `Evil` value was unpickled."""
    return tmp_path / "trace"


def repeat(request: Any) -> Any:
    return request.data


def was_read(trace: Path) -> bool:
    return trace.exists()


@pytest.fixture
def evil(trace: Path) -> bytes:
    return pickle.dumps(Evil(trace))


class Replica:
    """Answers the requests on a stream by hand, as a compromised replica could."""

    def __init__(self, url: str) -> None:
        self.redis: Any = Redis.from_url(url)

    def requests(self, *, batch: bool = False) -> list[tuple[str, str]]:
        """Return the caller and the id of each call."""
        stream = KEYS.batch("model") if batch else KEYS.requests("model")
        entries = self.redis.xrange(stream)
        return [(fields[b"by"].decode(), fields[b"id"].decode()) for _, fields in entries]

    def answer(self, make: Answering, *, batch: bool = False) -> None:
        """Answer what waits by what ``make`` returns for the id of a call, and forget it."""
        wait_until(lambda: self.requests(batch=batch))
        for caller, id_ in self.requests(batch=batch):
            for reply in make(id_):
                self.redis.execute_command("XADD", KEYS.replies(caller), "*", *reply.fields())
        self.redis.delete(KEYS.batch("model") if batch else KEYS.requests("model"))


@pytest.fixture
def replica(redis_url: str) -> Iterator[Replica]:
    replica = Replica(redis_url)
    yield replica
    replica.redis.close()


def whole(body: bytes) -> Answering:
    return lambda id_: [Reply(id_, codec="pickle", body=body)]


def large(id_: str) -> list[Any]:
    return [Reply(id_, codec="pickle", large=True)]


def in_parts(body: bytes) -> Answering:
    return lambda id_: [Part(id_, 0, "pickle", [len(body)], body=body), Reply(id_, codec="stream", body=b"1")]


@pytest.mark.parametrize("allow_pickle", [None, 1, "yes"])
def test_a_record_with_another_value_than_true_or_false_is_refused(
    site: Site, connected: Connection, allow_pickle: Any
) -> None:
    site.declare(allow_pickle=allow_pickle)
    with pytest.raises(WireError, match="'allow_pickle'"):
        connected.get_handle("ask")


def test_a_sync_handle_does_not_unpickle_a_reply_that_the_record_forbids(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare(allow_pickle=False)
    future = connected.get_handle("ask").remote(1)
    replica.answer(whole(evil))
    with pytest.raises(WireError, match=REFUSED):
        future.result(timeout=20)
    assert not was_read(trace)


async def test_an_asyncio_handle_does_not_unpickle_a_reply_that_the_record_forbids(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare()
    future = await connected.get_handle("ask", sync=False).remote(1)
    await asyncio.to_thread(replica.answer, whole(evil))
    with pytest.raises(WireError, match=REFUSED):
        await future
    assert not was_read(trace)


def test_the_body_of_a_large_pickled_reply_is_not_fetched(
    site: Site, connected: Connection, replica: Replica, trace: Path
) -> None:
    site.declare()
    future = connected.get_handle("ask").remote(1)
    wait_until(replica.requests)
    ((caller, id_),) = replica.requests()
    body = KEYS.reply_body(caller, id_)
    replica.redis.set(body, pickle.dumps((bytes(LARGE), Evil(trace))))
    replica.answer(large)
    with pytest.raises(WireError, match=REFUSED):
        future.result(timeout=20)
    assert not was_read(trace)
    wait_until(lambda: not replica.redis.exists(body))


def test_a_stream_does_not_unpickle_its_values(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare()
    stream: Any = connected.get_handle("ask").options(stream=True).remote(1)
    replica.answer(in_parts(evil))
    with pytest.raises(WireError, match=REFUSED):
        next(iter(stream))
    assert not was_read(trace)


def test_a_stream_does_not_unpickle_a_reply_that_is_not_streamed(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare()
    stream: Any = connected.get_handle("ask").options(stream=True).remote(1)
    replica.answer(whole(evil))
    with pytest.raises(WireError, match=REFUSED):
        next(iter(stream))
    assert not was_read(trace)


def test_a_batch_item_with_a_pickled_reply_has_an_error(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare()
    results = iter(connected.batch("ask").map([1]))
    with ThreadPoolExecutor(1) as thread:
        answering = thread.submit(replica.answer, whole(evil), batch=True)
        (result,) = results
        answering.result(timeout=20)
    with pytest.raises(WireError, match=REFUSED):
        result.get()
    assert not was_read(trace)


def test_a_pickled_result_for_an_earlier_producer_of_a_job_is_run_again(
    site: Site, connected: Connection, replica: Replica, evil: bytes, trace: Path
) -> None:
    site.declare()
    producer = connected.batch("ask", job="j", window=10)
    leave_queued(producer, site, 3)
    replica.answer(whole(evil), batch=True)
    site.serve(repeat)
    assert [result.get() for result in producer.map(range(3))] == [0, 1, 2]
    assert not was_read(trace)


def leave_queued(producer: handles.BatchProducer, site: Site, items: int) -> None:
    """Queue the items of a job, and leave it."""

    async def collect_all() -> None:
        async for _ in producer.as_completed(range(items)):
            pass

    async def begin() -> None:
        task = asyncio.create_task(collect_all())
        await wait_until_async(lambda: site.batch_depth() == items)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(begin())


async def test_a_proxy_never_unpickles(site: Site, replica: Replica, evil: bytes, trace: Path) -> None:
    for allow_pickle in (True, False):
        site.declare(allow_pickle=allow_pickle, route="/ask")
        proxy = Proxy(site.url, INSTANCE, "p", {"port": 0})
        url = str((await proxy.ready())["url"])
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            for make in (whole(evil), in_parts(evil)):
                asked = asyncio.ensure_future(http.get("/ask"))
                await asyncio.to_thread(replica.answer, make)
                assert (await asked).status_code == 500
                assert "pickle" in (await asked).json()["error"]["message"]
        await proxy.drain(0.2)
    assert not was_read(trace)


def test_values_arrive_where_the_record_allows_pickle(site: Site, connected: Connection, replica: Replica) -> None:
    site.declare(allow_pickle=True)
    body = pickle.dumps({1, 2})
    future = connected.get_handle("ask").remote(1)
    replica.answer(whole(body))
    assert future.result(timeout=20) == {1, 2}
    stream: Any = connected.get_handle("ask").options(stream=True).remote(1)
    replica.answer(in_parts(body))
    assert list(stream) == [{1, 2}]


@pytest.mark.parametrize("then", [True, False])
def test_replies_are_unpickled_when_the_record_allowed_it_before_or_after_the_call(
    site: Site, connected: Connection, replica: Replica, then: bool
) -> None:
    site.declare(allow_pickle=not then)
    future = connected.get_handle("ask").remote(1)
    stream: Any = connected.get_handle("ask").options(stream=True).remote(1)
    wait_until(lambda: len(replica.requests()) == 2)
    site.declare(allow_pickle=then)
    # At once: before the snapshot of this process has the change.
    replica.answer(whole(pickle.dumps({1, 2})))
    assert future.result(timeout=20) == {1, 2}
    assert list(stream) == [{1, 2}]
