"""The request client: calls and their outcomes, with connections that break."""

import asyncio
import gc
import os
import re
import signal
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.records import BackendRecord, BackendSpec, EndpointRecord
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Header
from penstock.handles.calls.call import Call, CallOutcome
from penstock.handles.calls.large_bodies import BUSY_CALLS, LEAST_LARGE, LEAST_LARGE_ALONE
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.errors import (
    BackendNotFound,
    BrokerUnavailable,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
    WireError,
)
from tests.handles.site import CONFIG, INSTANCE, Lingering, Site, echo
from tests.support.waiting import wait_until_async

APART = LEAST_LARGE_ALONE + 1
"""The size of a body that has a key of its own, and no reservation."""
BACKEND = BackendRecord(tag="model", version="1", code="", config=BackendSpec(**CONFIG))


@pytest.fixture
async def caller(site: Site) -> AsyncIterator[RequestClient]:
    caller = RequestClient(site.url, INSTANCE)
    await caller.open()
    yield caller
    await caller.close()


def send(
    caller: RequestClient, body: bytes = b"", *, backend: BackendRecord = BACKEND, timeout_s: float | None = None
) -> "tuple[Call, asyncio.Future[Reply]]":
    """Publish a request. Return the call, and the future of its reply or error."""
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def on_outcome(outcome: CallOutcome) -> None:
        assert not future.done(), "a call has one outcome"
        if isinstance(outcome, Reply):
            future.set_result(outcome)
        else:
            assert isinstance(outcome, BaseException), "a streamed reply was not requested"
            future.set_exception(outcome)
            future.exception()

    return caller.send(backend, Header(codec="bytes"), body, on_outcome, timeout_s=timeout_s), future


def cut(url: str) -> None:
    """Cut every connection to the broker."""
    with Redis.from_url(url) as redis:
        redis.client_kill_filter(_type="normal", skipme=True)


async def kill(server: EmbeddedServer) -> None:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until_async(lambda: server.pid not in (None, pid))


async def test_every_request_gets_its_own_reply(site: Site, caller: RequestClient) -> None:
    site.serve(echo)
    futures = [send(caller, b"%d" % n)[1] for n in range(1_000)]
    replies = await asyncio.gather(*futures)
    assert [reply.body for reply in replies] == [b"%d" % n for n in range(1_000)]
    await wait_until_async(lambda: site.depth() == 0)


async def test_acceptance_means_that_the_request_is_on_its_stream(site: Site, caller: RequestClient) -> None:
    site.declare()
    call, _ = send(caller)
    accepted = asyncio.ensure_future(call.accepted())
    assert not accepted.done()
    await accepted
    assert site.depth() == 1
    call.cancel()
    await wait_until_async(lambda: site.depth() == 0)


async def test_a_refusal_names_the_length_of_the_queue_and_its_limit(site: Site, caller: RequestClient) -> None:
    site.declare()
    small = BackendRecord(tag="model", version="1", code="", config=BackendSpec(max_queued_requests=2))
    calls = [send(caller, backend=small) for _ in range(3)]
    await asyncio.gather(*[call.accepted() for call, _ in calls[:2]])
    for refused in (calls[2][0].accepted(), calls[2][1]):
        with pytest.raises(Overloaded, match="2 unsettled requests \\(max_queued_requests is 2\\)"):
            await refused
    for call, _ in calls[:2]:
        assert call.cancel()
    await wait_until_async(lambda: site.depth() == 0)


@pytest.mark.parametrize("size", [APART, LARGE + 1])
async def test_a_refused_large_request_leaves_no_body(site: Site, caller: RequestClient, size: int) -> None:
    full = BackendRecord(tag="model", version="1", code="", config=BackendSpec(max_queued_requests=0))
    with pytest.raises(Overloaded):
        await send(caller, bytes(size), backend=full)[1]
    await wait_until_async(lambda: site.keys_left() == set())


async def test_bodies_of_refused_requests_are_not_stored(site: Site, caller: RequestClient) -> None:
    site.declare()
    body = bytes(2 * 1024 * 1024)
    narrow = BackendRecord(tag="model", version="1", code="", config=BackendSpec(max_queued_bytes=5 * len(body)))
    with Redis.from_url(site.url) as redis:
        redis.config_resetstat()
        calls = [send(caller, body, backend=narrow) for _ in range(25)]
        outcomes = await asyncio.gather(*[call.accepted() for call, _ in calls], return_exceptions=True)
        stored = redis.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]
    refused = [error for error in outcomes if error is not None]
    assert len(outcomes) - len(refused) == stored == 4  # and their heads
    assert all(isinstance(error, Overloaded) for error in refused)
    assert re.search(r"take \d+ bytes, and this one has 20\d+ more \(max_queued_bytes is 10485760\)", str(refused[0]))
    for call, outcome in calls:
        call.cancel()
        outcome.cancel()
    await wait_until_async(lambda: site.depth() == 0 and site.keys_left() == set())


async def test_a_busy_caller_keeps_smaller_bodies_apart_from_their_entries(site: Site, caller: RequestClient) -> None:
    site.declare()
    body = bytes(LEAST_LARGE + 1)
    calls: list[tuple[Call, asyncio.Future[Reply]]] = []
    for expected in [0] * BUSY_CALLS + [1, 2]:
        calls.append(send(caller, body))
        await calls[-1][0].accepted()
        assert len(site.keys_left() - {caller.keys.sizes("model")}) == expected
    for call, outcome in calls:
        assert call.cancel()
        outcome.cancel()
    await wait_until_async(lambda: site.depth() == 0 and not site.keys_left())


async def test_a_body_outlives_the_deadline_of_its_request_by_a_minute(site: Site, caller: RequestClient) -> None:
    site.declare()
    with Redis.from_url(site.url) as redis:
        for timeout_s, least_s, most_s in ((30.0, 30, 90), (None, 14 * 86_400, 15 * 86_400)):
            call, outcome = send(caller, bytes(APART), timeout_s=timeout_s)
            await call.accepted()
            assert least_s < redis.ttl(caller.keys.body("model", call.id)) <= most_s
            assert call.cancel()
            outcome.cancel()
    await wait_until_async(lambda: site.depth() == 0 and not site.keys_left())


@pytest.mark.parametrize("size", [APART, LARGE + 1])
async def test_a_request_that_is_cancelled_before_its_body_is_stored_leaves_nothing(
    site: Site, caller: RequestClient, size: int
) -> None:
    site.declare()
    call, outcome = send(caller, bytes(size))
    assert call.cancel()
    outcome.cancel()
    other, answer = send(caller, bytes(size))
    await other.accepted()
    assert site.depth() == 1
    other.cancel()
    answer.cancel()
    await wait_until_async(lambda: site.depth() == 0 and site.keys_left() == set())


async def test_a_request_that_could_never_be_queued_is_too_large(caller: RequestClient) -> None:
    narrow = BackendRecord(tag="model", version="1", code="", config=BackendSpec(max_queued_bytes=1024 * 1024))
    with pytest.raises(PayloadTooLarge, match=r"max_queued_bytes of 'model' is 1048576"):
        send(caller, bytes(1024 * 1024), backend=narrow)


async def test_a_stream_without_ids_left_is_repaired_by_deleting_it_and_cutting_the_connections(
    site: Site, caller: RequestClient
) -> None:
    """As ``docs/operations.md`` describes: requests in flight are published again."""
    site.declare()
    first, answer = send(caller, b"first")
    await first.accepted()
    requests = caller.keys.requests("model")
    with Redis.from_url(site.url) as redis:
        redis.xadd(requests, {"x": ""}, id="18446744073709551615-18446744073709551615")
        with pytest.raises(BrokerUnavailable, match="exhausted the last possible ID"):
            await send(caller, b"second")[1]
        redis.delete(requests)
    cut(site.url)
    site.serve(echo)
    assert (await answer).body == b"first"
    assert (await send(caller, b"third")[1]).body == b"third"


async def test_an_endpoint_without_backends_is_refused(caller: RequestClient) -> None:
    for traffic in ({}, {"gone": 1.0}):
        with pytest.raises(BackendNotFound):
            caller.dispatch(EndpointRecord(name="e", traffic=traffic), Header(), b"", lambda outcome: None)


async def test_a_deadline_is_kept_without_any_replica(site: Site, caller: RequestClient) -> None:
    site.declare()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    with pytest.raises(RequestTimeout, match=r"backend 'model' did not answer within 0\.3 s"):
        await send(caller, timeout_s=0.3)[1]
    assert 0.29 < loop.time() - started_at < 5
    await wait_until_async(lambda: site.depth() == 0)


async def test_a_deadline_is_kept_without_a_broker(durable: EmbeddedServer) -> None:
    """The deadline of the request, and of a task that awaits its acceptance."""
    caller = RequestClient(durable.url, INSTANCE)
    await caller.open()
    durable.stop()
    await wait_until_async(lambda: not caller.connected)
    call, future = send(caller, timeout_s=0.2)
    for waiting in (call.accepted(), future):
        with pytest.raises(RequestTimeout):
            await waiting
    await caller.close()


@pytest.mark.slow
async def test_a_call_without_a_deadline_fails_when_the_broker_is_away(durable: EmbeddedServer) -> None:
    caller = RequestClient(durable.url, INSTANCE)
    await caller.open()
    durable.stop()
    await wait_until_async(lambda: not caller.connected)
    call, future = send(caller)
    waits: list[asyncio.Future[Any]] = [call.accepted(), future]
    for waiting in waits:
        with pytest.raises(BrokerUnavailable):
            await asyncio.wait_for(waiting, 20)
    await caller.close()


async def test_cancelling_a_queued_request_means_that_it_never_starts(site: Site, caller: RequestClient) -> None:
    started: list[bytes] = []

    def note(request: Any) -> None:
        started.append(request.data)

    site.declare()
    cancelled, kept = send(caller, b"cancelled"), send(caller, b"kept")
    await asyncio.gather(cancelled[0].accepted(), kept[0].accepted())
    assert cancelled[0].cancel()
    assert not cancelled[0].cancel(), "a call ends once"
    await wait_until_async(lambda: site.depth() == 1)
    site.serve(note)
    await kept[1]
    await wait_until_async(lambda: site.depth() == 0)
    assert started == [b"kept"]
    assert not cancelled[1].done()


async def test_cancelling_before_the_broker_has_answered_withdraws_the_request(
    site: Site, caller: RequestClient
) -> None:
    site.declare()
    call, _ = send(caller, bytes(LARGE + 1))
    waiting = call.accepted()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await caller.registry.snapshot()  # on the same connection: earlier commands have been answered
    await wait_until_async(lambda: site.depth() == 0 and not site.keys_left())


async def test_cancelling_a_running_request_cancels_it(site: Site, caller: RequestClient) -> None:
    lingering = Lingering()
    site.serve(lingering.run)
    call, _ = send(caller)
    await wait_until_async(lingering.running.is_set)
    call.cancel()
    await wait_until_async(lingering.cancelled.is_set)
    await wait_until_async(lambda: site.depth() == 0)


async def test_large_bodies_travel_both_ways_and_leave_nothing(site: Site, caller: RequestClient) -> None:
    site.serve(echo)
    bodies = [os.urandom(size) for size in (LEAST_LARGE, APART, LARGE, LARGE + 1, 5 * LARGE)]
    replies = await asyncio.gather(*[send(caller, body)[1] for body in bodies])
    assert [reply.body for reply in replies] == bodies
    await wait_until_async(lambda: site.depth() == 0 and not site.keys_left())


async def test_a_reply_whose_body_has_expired_is_an_error(site: Site, caller: RequestClient) -> None:
    site.declare()
    call, future = send(caller)
    await call.accepted()
    with Redis.from_url(site.url) as redis:
        fields = Reply(call.id, large=True).fields()
        redis.execute_command("XADD", caller.keys.replies(caller.id), "*", *fields)
    with pytest.raises(WireError, match="has expired"):
        await future


async def test_garbage_among_the_replies_affects_no_other_call(site: Site, caller: RequestClient) -> None:
    running, release = threading.Event(), threading.Event()

    def hold(request: Any) -> bytes:
        running.set()
        release.wait(20)
        return b"well"

    site.serve(hold)
    call, future = send(caller)
    await wait_until_async(running.is_set)
    with Redis.from_url(site.url) as redis:
        key = caller.keys.replies(caller.id)
        redis.xadd(key, {"garbage": "x"})
        redis.xadd(key, {"v": "1", "id": "another caller's", "h": "{}"})
        redis.xadd(key, {"v": "9", "id": "unheard-of"})
    release.set()
    assert (await future).body == b"well"
    assert call.entry is not None


async def test_a_reply_that_cannot_be_read_fails_its_request(site: Site, caller: RequestClient) -> None:
    site.declare()
    call, future = send(caller)
    await call.accepted()
    with Redis.from_url(site.url) as redis:
        redis.xadd(caller.keys.replies(caller.id), {"v": "2", "id": call.id})
    with pytest.raises(WireError, match="version b'2'"):
        await future
    with Redis.from_url(site.url) as redis:
        redis.delete(caller.keys.requests("model"))


async def test_shadow_backends_get_copies_whose_replies_go_nowhere(site: Site, caller: RequestClient) -> None:
    received: list[bytes] = []

    def shadow(request: Any) -> None:
        received.append(request.data)
        raise RuntimeError("on purpose")

    site.serve(echo)
    site.serve(shadow, tag="candidate", name="other")
    site.send_traffic("ask", {"model": 1.0}, {"candidate": 1.0, "gone": 1.0})
    await caller.watcher.wait_for(3, 5)
    bodies = [b"small", bytes(LEAST_LARGE + 1), bytes(LARGE + 1)]
    for body in bodies:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        caller.dispatch(caller.snapshot.endpoints["ask"], Header(codec="bytes"), body, future.set_result)
        assert (await future).body == body
    await wait_until_async(lambda: received == bodies)
    await wait_until_async(lambda: site.depth("candidate") == 0 and not site.keys_left())
    assert (caller.shadows.stats["candidate"].queued, caller.shadows.stats["candidate"].refused) == (3, 0)


# -- broken connections


async def test_requests_are_answered_while_connections_are_cut(site: Site, caller: RequestClient) -> None:
    """Each request is answered without an error, in whatever phase the cut meets it."""
    site.serve(echo)
    answered = 0

    async def keep_asking(n: int) -> None:
        nonlocal answered
        while answered < 3_000:
            body = bytes((LARGE if n % 20 else LEAST_LARGE) + 1) if n % 10 == 0 else b"%d" % n
            reply = await asyncio.wait_for(send(caller, body)[1], 15)
            assert (reply.error, reply.body) == (None, body)
            answered += 1

    asking = asyncio.gather(*[keep_asking(n) for n in range(50)])
    while not asking.done():
        await asyncio.sleep(0.2)
        cut(site.url)
    await asking
    await wait_until_async(lambda: site.depth() == 0)


async def test_requests_that_redis_lost_are_published_again(durable: EmbeddedServer) -> None:
    """The entry, its large body, the reply stream and the group are gone, as after the loss of a disk."""
    site = Site(durable.url)
    site.declare()
    caller = RequestClient(durable.url, INSTANCE)
    await caller.open()
    bodies = [b"small", bytes(APART), bytes(LARGE + 1)]
    calls = [send(caller, body) for body in bodies]
    await asyncio.gather(*[call.accepted() for call, _ in calls])
    with Redis.from_url(durable.url) as redis:
        redis.flushall()
    await kill(durable)
    site.serve(echo)
    for (_, future), body in zip(calls, bodies, strict=True):
        assert (await asyncio.wait_for(future, 10)).body == body
    await caller.close()
    site.close()


async def test_an_accepted_request_is_answered_after_the_broker_was_killed(durable: EmbeddedServer) -> None:
    site = Site(durable.url)
    release = threading.Event()
    runs: list[bytes] = []

    def hold(request: Any) -> bytes:
        runs.append(request.data)
        release.wait(20)
        return b"done"

    site.serve(hold)
    caller = RequestClient(durable.url, INSTANCE)
    await caller.open()
    (_, running), (_, queued) = send(caller, b"running"), send(caller, b"queued")
    await wait_until_async(lambda: runs == [b"running"])
    await kill(durable)
    release.set()
    for future in (running, queued):
        assert (await asyncio.wait_for(future, 10)).body == b"done"
    await wait_until_async(lambda: site.depth() == 0)
    await caller.close()
    site.close()


async def test_a_request_cancelled_while_the_broker_is_away_never_starts(durable: EmbeddedServer) -> None:
    """Its request was sent, and the client does not know whether it has arrived."""
    site = Site(durable.url)
    site.declare()
    caller = RequestClient(durable.url, INSTANCE)
    await caller.open()
    pid = durable.pid
    assert pid is not None
    started: list[bytes] = []

    def note(request: Any) -> None:
        started.append(request.data)

    call, _ = send(caller, b"cancelled")
    await asyncio.sleep(0)  # the request has been written, and no answer read
    await asyncio.sleep(0)
    cut(durable.url)
    await wait_until_async(lambda: call.fate_unknown or call.entry is not None)
    call.cancel()
    await wait_until_async(lambda: caller.connected)
    await wait_until_async(lambda: site.depth() == 0)
    site.serve(note)
    assert (await send(caller, b"kept")[1]).status == 200
    assert started == [b"kept"]
    await caller.close()
    site.close()


# -- opening and closing


async def test_all_users_of_a_loop_share_a_client(site: Site) -> None:
    first, *others = await asyncio.gather(*[SharedClient.get(site.url, INSTANCE) for _ in range(5)])
    assert others == [first] * 4
    await first.close()
    second = await SharedClient.get(site.url, INSTANCE)
    assert second is not first
    assert not second.closed
    await second.close()


async def test_a_cancelled_connection_attempt_does_not_cancel_the_others(site: Site) -> None:
    asking = [asyncio.ensure_future(SharedClient.get(site.url, INSTANCE)) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()
    second, third = await asyncio.gather(*asking[1:])
    assert second is third
    assert second is await SharedClient.get(site.url, INSTANCE)
    await second.close()


async def test_a_client_that_could_not_connect_is_created_again(durable: EmbeddedServer) -> None:
    with Redis.from_url(durable.url) as admin:
        admin.config_set("requirepass", "geheim")
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match="Authentication required"):
                await SharedClient.get(durable.url, INSTANCE)
        admin.config_set("requirepass", "")
    caller = await SharedClient.get(durable.url, INSTANCE)
    assert caller.connected
    await caller.close()


async def test_closing_fails_the_calls_in_flight_and_leaves_nothing(site: Site) -> None:
    site.declare()
    caller = RequestClient(site.url, INSTANCE)
    await caller.open()
    call, future = send(caller, bytes(LARGE + 1))
    unheard, _ = send(caller)
    await call.accepted()
    acceptance = unheard.accepted()
    await caller.close()
    with pytest.raises(RequestCancelled):
        await future
    assert isinstance(await asyncio.gather(acceptance, return_exceptions=True), list)
    with pytest.raises(BrokerUnavailable, match="closed"):
        await send(caller)[1]
    await wait_until_async(lambda: site.depth() == 0 and not site.keys_left())
    with Redis.from_url(site.url) as redis:
        assert not redis.exists(caller.keys.replies(caller.id))


async def test_closing_while_connecting_stops_the_connection_attempt(site: Site) -> None:
    caller = RequestClient(site.url, INSTANCE)
    opening = asyncio.ensure_future(caller.open())
    await asyncio.sleep(0.001)
    await caller.close()
    await asyncio.gather(opening, return_exceptions=True)
    assert caller.closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_loop_that_ends_without_closing_ends_its_client(site: Site) -> None:
    """Without a "task was destroyed", an unclosed transport or a client that is kept alive."""
    site.serve(echo)

    async def ask() -> SharedClient:
        caller = await SharedClient.get(site.url, INSTANCE)
        assert (await send(caller, b"x")[1]).body == b"x"
        send(caller, b"left in flight")
        return caller

    left: list[weakref.ref[SharedClient]] = []
    for _ in range(3):
        caller = asyncio.run(ask())
        assert caller.closed
        assert not caller.connected
        left.append(weakref.ref(caller))
        del caller
    gc.collect()
    assert [caller() for caller in left] == [None] * 3
