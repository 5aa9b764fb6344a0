import asyncio
import itertools
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from penstock.broker.queue.flow_control import CHUNK, WINDOW
from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.wire._fields import VALUE_COST
from penstock.broker.wire.replies import Part, Reply
from penstock.broker.wire.requests import Entry, Header
from penstock.handles.calls.call import Call, CallOutcome
from penstock.handles.calls.incoming_stream import IncomingStream
from penstock.handles.errors import StreamBroken
from penstock.workers.claim import Claim
from penstock.workers.consuming.stream_sender import StreamSender
from penstock.workers.executing.stream_writer import StreamStopped, StreamWriter
from tests.support.waiting import wait_until_async
from tests.workers.serving import CONFIG, TAG, Client, Killable, calling, serving, start_killable


def ask(client: Client) -> "tuple[Call, asyncio.Future[CallOutcome]]":
    """Send a request whose reply may be streamed."""
    begun: asyncio.Future[CallOutcome] = asyncio.get_running_loop().create_future()
    backend = BackendRecord(tag=TAG, version="1", code="", config=BackendSpec(**CONFIG))
    return client.caller.send(backend, Header(codec="none", window=WINDOW), b"", begun.set_result), begun


async def begun(outcome: "asyncio.Future[CallOutcome]") -> IncomingStream:
    incoming = await asyncio.wait_for(outcome, 10)
    assert isinstance(incoming, IncomingStream), incoming
    return incoming


async def rest_of(incoming: IncomingStream) -> list[bytes]:
    got: list[bytes] = []
    while pieces := await incoming.read():
        got += [piece.body for piece in pieces]
    return got


@pytest.fixture
async def replica(redis_url: str) -> AsyncIterator[Killable]:
    replica = await start_killable(redis_url, "tick")
    yield replica
    await replica.kill()


async def nothing_is_left(client: Client) -> None:
    async def left() -> bool:
        return await client.depth() == 0

    await wait_until_async(left)


async def test_streams_of_a_killed_replica_break_off_and_do_not_run_again(redis_url: str, replica: Killable) -> None:
    ran: list[str] = []

    async def elsewhere(request: object) -> str:
        ran.append("again")
        return "again"

    async with calling(redis_url) as client:
        _, outcome = ask(client)
        incoming = await begun(outcome)
        assert (await incoming.read())[0].body == b"0"
        async with serving(redis_url, elsewhere):
            loop = asyncio.get_running_loop()
            killed_at = loop.time()
            await replica.kill()
            with pytest.raises(StreamBroken, match="its replica died"):
                await rest_of(incoming)
            assert loop.time() - killed_at < 6.0  # the lease of 2 s, and time for a busy machine
            await nothing_is_left(client)
            assert ran == []
            # No key of the stream is left.
            assert await client.redis.keys("*:streamed:*") == []
            assert await client.redis.keys("*:history:*") == []


async def test_streams_of_a_killed_replica_break_off_while_the_others_are_busy_with_streams(
    redis_url: str, replica: Killable
) -> None:
    async with calling(redis_url) as client:
        incoming = await begun(ask(client)[1])
        other = await start_killable(redis_url, "tick")
        try:
            busy = [await begun(outcome) for outcome in [ask(client)[1] for _ in range(4)]]
            await replica.kill()
            with pytest.raises(StreamBroken, match="its replica died"):
                await rest_of(incoming)
            for one in busy:
                one.close()
        finally:
            await other.kill()


async def test_a_stream_stops_when_its_caller_sends_no_signal(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.workers.consuming.stream_sender.LAPSE_S", 0.5)
    monkeypatch.setattr("penstock.handles.calls.sweep.REPEAT_S", 3600.0)
    ended = threading.Event()

    def endless(request: object) -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * CHUNK
        finally:
            ended.set()

    async with calling(redis_url) as client, serving(redis_url, endless):
        incoming = await begun(ask(client)[1])
        await wait_until_async(ended.is_set)
        with pytest.raises(StreamBroken, match=r"sent no signal for 0\.5 s"):
            await rest_of(incoming)
        await nothing_is_left(client)


@pytest.mark.parametrize("on_loop", [False, True])
async def test_streams_of_shadow_traffic_are_dropped_and_stopped(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, on_loop: bool
) -> None:
    monkeypatch.setattr("penstock.workers.consuming.stream_sender.LAPSE_S", 0.2)
    made, ended = list[int](), threading.Event()

    def endless(request: object) -> Iterator[str]:
        try:
            for n in itertools.count():
                made.append(n)
                yield "x" * CHUNK
        finally:
            ended.set()

    async def endless_on_loop(request: object) -> AsyncIterator[str]:
        try:
            for n in itertools.count():
                made.append(n)
                yield "x" * CHUNK
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def whole(request: object) -> AsyncIterator[str]:
        for n in range(3):
            yield str(n)

    shadow = "shadow"
    backend = BackendRecord(tag=shadow, version="1", code="", config=BackendSpec(**CONFIG))
    async with calling(redis_url) as client, serving(redis_url, whole):
        keys = client.caller.keys
        async with serving(redis_url, endless_on_loop if on_loop else endless, tag=shadow) as worker:
            endpoint = EndpointRecord(name="e", traffic={TAG: 1.0}, shadows={shadow: 1.0})
            served = BackendRecord(tag=TAG, version="1", code="", config=BackendSpec(**CONFIG))
            version = await client.caller.registry.change(
                lambda _: Change({TAG: served, shadow: backend}, {"e": endpoint})
            )
            await client.caller.watcher.wait_for(version, 5)
            outcome: asyncio.Future[CallOutcome] = asyncio.get_running_loop().create_future()
            client.caller.dispatch(endpoint, Header(codec="none", window=WINDOW), b"", outcome.set_result)
            assert await rest_of(await begun(outcome)) == [b"0", b"1", b"2"]
            await wait_until_async(ended.is_set)
            await wait_until_async(lambda: worker.in_progress == 0)
            assert len(made) * CHUNK > WINDOW  # it did not wait for a reader either
            assert worker.run_stats.failed == 0

            async def nothing_is_kept() -> bool:
                kept = await client.redis.keys("*:streamed:*") + await client.redis.keys("*:body:*")
                return not kept and await client.redis.xlen(keys.requests(shadow)) == 0

            await wait_until_async(nothing_is_kept)
        await client.caller.registry.erase()


async def test_a_stream_stops_when_the_reply_stream_of_its_caller_is_gone(redis_url: str) -> None:
    ended = asyncio.Event()

    async def endless(request: object) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async with calling(redis_url) as client, serving(redis_url, endless) as worker:
        await begun(ask(client)[1])
        await client.redis.delete(client.caller.keys.replies(client.caller.id))
        await asyncio.wait_for(ended.wait(), 10)
        await wait_until_async(lambda: worker.in_progress == 0)


async def test_a_caller_repeats_grants_that_were_lost(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.handles.calls.sweep.REPEAT_S", 0.05)
    values = [b"%d" % n * 1000 for n in range(1000)]

    def give(request: object) -> Iterator[bytes]:
        yield from values

    received: list[bytes] = []
    on_signal = StreamSender.on_signal

    def lose_two_of_three(sender: StreamSender, signal: bytes) -> None:
        received.append(signal)
        if len(received) % 3 == 0:
            on_signal(sender, signal)

    monkeypatch.setattr(StreamSender, "on_signal", lose_two_of_three)
    async with calling(redis_url) as client, serving(redis_url, give):
        assert await rest_of(await begun(ask(client)[1])) == values
        assert len(received) >= 3


async def test_grants_with_guessed_ids_open_no_window(redis_url: str) -> None:
    value, sent = bytes(1_000), 0
    cost = len(value) + VALUE_COST

    def give(request: object) -> Iterator[bytes]:
        nonlocal sent
        while True:
            yield value
            sent += 1

    async with calling(redis_url) as client, serving(redis_url, give):
        call, outcome = ask(client)
        incoming = await begun(outcome)
        full = -(-WINDOW // cost)
        await wait_until_async(lambda: sent >= full - 1)
        caller, signals = client.caller.id, client.caller.keys.signals(TAG)
        for id_ in ("", "1", caller, f"{caller}-1", call.shown_id, call.id[:-1], call.id.upper() + "0"):
            await client.redis.xadd(signals, {"s": f"+{id_} {2**40}"})
        # The valid grant follows them, so they were received when it takes effect.
        before = sent
        await client.redis.xadd(signals, {"s": f"+{call.id} {3 * cost}"})
        await wait_until_async(lambda: sent >= before + 3)
        assert sent <= full + 4
        incoming.close()


async def test_two_requests_with_the_same_id_have_two_streams(redis_url: str) -> None:
    """Callers choose the ids of their requests."""
    begun = 0
    both = asyncio.Event()

    async def give(request: object) -> AsyncIterator[bytes]:
        nonlocal begun
        yield b"first"
        begun += 1
        if begun == 2:
            both.set()
        await both.wait()
        for _ in range(2 * WINDOW // CHUNK):  # more than is sent without a grant
            yield bytes(CHUNK)

    async with calling(redis_url) as client, serving(redis_url, give, max_concurrent_queries=2):
        keys, redis = client.caller.keys, client.redis
        callers = ("one", "two")
        for caller in callers:
            await redis.xadd(keys.replies(caller), {"begins": "here"})
            fields = Entry("same", caller, Header(codec="none", window=WINDOW)).fields()
            await redis.xadd(keys.requests(TAG), dict(zip(fields[::2], fields[1::2], strict=True)))
        await asyncio.wait_for(both.wait(), 10)
        await redis.xadd(keys.signals(TAG), {"s": b"+same %d" % (10 * WINDOW)})
        await redis.expire(keys.signals(TAG), 60)
        await nothing_is_left(client)
        for caller in callers:
            replies: list[tuple[bytes, dict[bytes, bytes]]] = cast(Any, await redis.xrange(keys.replies(caller)))
            _, *parts, end = [flatten(fields) for _, fields in replies]
            assert sum(len(Part.of(fields).body) for fields in parts) == len(b"first") + 2 * WINDOW
            assert Reply.of(end).codec == "stream"
            await redis.delete(keys.replies(caller))

        async def unmarked() -> bool:
            return await redis.keys("*:streamed:*") == []

        await wait_until_async(unmarked)


def flatten(fields: dict[bytes, bytes]) -> list[bytes]:
    return [each for pair in fields.items() for each in pair]


# -- writer and reader, without a broker between them


class Wire:
    """A stream sink that keeps the parts for an `IncomingStream`."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.parts: deque[list[bytes]] = deque()
        self.begun = 0

    def begin(self, writer: StreamWriter) -> None:
        self.begun += 1

    def send(self, writer: StreamWriter, part: Part) -> None:
        assert len(part.body) <= 2 * CHUNK
        self.parts.append(part.fields())


@given(
    st.lists(st.tuples(st.sampled_from(["text", "json", "bytes"]), st.integers(0, 3 * CHUNK)), max_size=30),
    st.integers(1, 4 * CHUNK),
    st.randoms(use_true_random=False),
)
def test_values_arrive_in_order_and_at_most_a_window_is_in_flight(
    values: list[tuple[str, int]], window: int, chance: random.Random
) -> None:
    async def run() -> None:
        entry = Entry("id", "caller", Header(window=window))
        wire = Wire(window)
        flow = StreamWriter(wire, asyncio.get_running_loop(), Claim(b"0-0", entry))
        incoming: IncomingStream | None = None
        got: list[tuple[str, bytes]] = []
        unfinished = b""

        async def make() -> None:
            for n, (codec, size) in enumerate(values):
                await flow.put_soon(codec, bytes([n]) * size)

        making = asyncio.create_task(make())
        ended = False
        while True:
            if making.done() and not ended:
                making.result()
                flow.finish()
                ended = True
            if chance.random() < 0.5 or making.done():
                while wire.parts:
                    part = Part.of(wire.parts.popleft())
                    if incoming is None:
                        incoming = IncomingStream(part, "b", lambda: "r", window, flow.grant, flow.stop)
                    incoming.add(part)
            if ended and incoming is not None:
                incoming.end(Reply("id", codec="stream", body=b"%d" % flow.parts))
            if incoming is not None and (ended or incoming._pieces):  # pyright: ignore[reportPrivateUsage]
                pieces = await incoming.read()
                assert ended or sum(len(p.body) + VALUE_COST for p in pieces) < window + CHUNK + VALUE_COST
                for codec, body, more in pieces:
                    unfinished += body
                    if not more:
                        got.append((codec, unfinished))
                        unfinished = b""
                if ended and not pieces:
                    break
            await asyncio.sleep(0)
        assert got == [(codec, bytes([n]) * size) for n, (codec, size) in enumerate(values)]
        assert wire.begun == 1

    asyncio.run(run())


@given(st.permutations(range(5)))
def test_parts_out_of_order_are_never_delivered(order: list[int]) -> None:
    async def run() -> None:
        parts = [Part("id", n, "text", [1], False, 200, [], b"%d" % n) for n in range(5)]
        incoming = IncomingStream(parts[order[0]], "b", lambda: "r", 1000, lambda taken: None, lambda: None)
        good = 0
        for n in order:
            try:
                incoming.add(parts[n])
            except StreamBroken:
                break
            good += 1
        assert list(order[:good]) == list(range(good))
        if good == 5:
            incoming.end(Reply("id", codec="stream", body=b"5"))
            assert [piece.body for piece in await incoming.read()] == [b"0", b"1", b"2", b"3", b"4"]
            assert await incoming.read() == []

    asyncio.run(run())


async def test_repeated_parts_are_delivered_once() -> None:
    parts = [Part("id", n, "text", [1], False, 200, [], b"%d" % n) for n in range(4)]
    incoming = IncomingStream(parts[0], "b", lambda: "r", 1000, lambda taken: None, lambda: None)
    for n in (0, 1, 2, 1, 2, 3):
        incoming.add(parts[n])
    incoming.end(Reply("id", codec="stream", body=b"4"))
    assert [piece.body for piece in await incoming.read()] == [b"0", b"1", b"2", b"3"]
    assert await incoming.read() == []


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Reply("id", codec="stream", body=b"3"), "it had 3 parts, of which 1 came"),
        (Reply("id", codec="text", body=b"whole"), "another replica gave a whole answer"),
    ],
)
async def test_an_end_that_does_not_match_the_parts_is_an_error(end: Reply, said: str) -> None:
    part = Part("id", 0, "text", [1], body=b"a")
    incoming = IncomingStream(part, "b", lambda: "r", 1000, lambda taken: None, lambda: None)
    incoming.add(part)
    incoming.end(end)
    assert len(await incoming.read()) == 1
    with pytest.raises(StreamBroken, match=said):
        await incoming.read()


async def test_a_thread_that_waits_for_the_window_is_stopped() -> None:
    wire = Wire(1)
    loop = asyncio.get_running_loop()
    flow = StreamWriter(wire, loop, Claim(b"0-0", Entry("id", "caller", Header(window=1))))
    flow.put("text", b"a")
    waiting = loop.run_in_executor(None, flow.put, "text", b"b")
    await wait_until_async(lambda: wire.parts)
    assert not waiting.done()
    flow.stop()
    with pytest.raises(StreamStopped):
        await waiting
