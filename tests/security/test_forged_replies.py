"""Replies that nobody was asked for: a process that may write to every reply stream can answer no call of others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Part, Reply
from penstock.broker.wire.requests import Entry, Header
from penstock.handles.calls.call import Call, CallOutcome
from penstock.handles.calls.incoming_stream import IncomingStream
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.errors import BackendError, to_wire
from tests.security.site import KEYS, Site, echo
from tests.support.guarded import Guarded
from tests.support.waiting import wait_until_async


class Forger:
    """A client with the rights of a replica, which writes replies."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis

    def write(self, caller: str, *replies: Reply | Part) -> None:
        for reply in replies:
            self.redis.execute_command("XADD", KEYS.replies(caller), "NOMKSTREAM", "*", *reply.fields())

    def write_together(self, caller: str, ids: list[str]) -> None:
        fields = Reply.fields_of([Reply(id_, codec="text", body=b"forged") for id_ in ids])
        self.redis.execute_command("XADD", KEYS.replies(caller), "NOMKSTREAM", "*", *fields)


@pytest.fixture
def forger(broker: Guarded) -> Iterator[Forger]:
    with Redis.from_url(broker.url("replica")) as redis:
        yield Forger(redis)


def guesses(caller: str, *shown: str) -> list[str]:
    """Return what a forger would try: numbers, how earlier versions named calls, and whatever is shown."""
    names = [caller, caller.partition("@")[2], caller.partition("@")[0]]
    numbered = [f"{name}{kind}{n}" for name in names for kind in ("-", "-s", ":") for n in range(20)]
    return ["", "0", "1", "0" * 32, *names, *numbered, *shown]


def forgeries(id_: str) -> list[Reply | Part]:
    return [
        Reply(id_, codec="text", body=b"forged"),
        Reply(id_, codec="text", large=True),
        Reply(id_, 500, error=to_wire(BackendError("ValueError", "forged"))),
        Part(id_, 0, "text", [6], body=b"forged"),
        Reply(id_, codec="stream", body=b"1"),
    ]


def ids_on(redis: Any, stream: str) -> list[str]:
    """Return the ids of the calls whose requests lie on a stream."""
    return [fields[b"id"].decode() for _, fields in redis.xrange(stream)]


def collect(caller: RequestClient, backend: BackendRecord, **header: Any) -> tuple[Call, list[CallOutcome]]:
    outcomes: list[CallOutcome] = []
    return caller.send(backend, Header(codec="bytes", **header), b"x", outcomes.append), outcomes


@pytest.mark.parametrize("request_id", ["web-1", ""])
async def test_a_reply_without_the_id_of_its_call_is_ignored(
    site: Site, broker: Guarded, forger: Forger, request_id: str
) -> None:
    backend = await site.declare()
    alice = RequestClient(broker.url("alice"), "default")
    await alice.open()
    call, outcomes = collect(alice, backend, request_id=request_id)
    await call.accepted()
    assert call.entry is not None
    tried = guesses(alice.id, request_id, call.shown_id, call.entry.decode(), call.id[:-1], call.id.upper() + "0")
    for id_ in tried:
        forger.write(alice.id, *forgeries(id_))
    forger.write_together(alice.id, tried)
    await alice.drain_replies()
    assert outcomes == []

    forger.write(alice.id, Reply(call.id, codec="text", body=b"right"))
    await wait_until_async(lambda: outcomes)
    assert isinstance(outcomes[0], Reply)
    assert outcomes[0].body == b"right"
    await alice.close()


async def test_parts_without_the_id_of_their_call_are_ignored(site: Site, broker: Guarded, forger: Forger) -> None:
    backend = await site.declare()
    alice = RequestClient(broker.url("alice"), "default")
    await alice.open()
    call, outcomes = collect(alice, backend, window=1_000)
    await call.accepted()
    forger.write(alice.id, Part(call.id, 0, "text", [5], body=b"right"))
    await wait_until_async(lambda: outcomes)
    (incoming,) = outcomes
    assert isinstance(incoming, IncomingStream)
    for id_ in guesses(alice.id, call.shown_id):
        forger.write(alice.id, Part(id_, 1, "text", [6], body=b"forged"), Reply(id_, codec="stream", body=b"2"))
    forger.write(alice.id, Part(call.id, 1, "text", [5], body=b"right"), Reply(call.id, codec="stream", body=b"2"))
    pieces = await incoming.read() + await incoming.read()
    while more := await incoming.read():
        pieces += more
    assert [piece.body for piece in pieces] == [b"right", b"right"]
    await alice.close()


async def test_the_id_of_one_call_does_not_reveal_that_of_another(site: Site, broker: Guarded, forger: Forger) -> None:
    """What a replica sees of the calls that it runs does not help it to answer others of the same caller."""
    backend = await site.declare()
    alice = RequestClient(broker.url("alice"), "default")
    await alice.open()
    calls = [collect(alice, backend) for _ in range(50)]
    for call, _ in calls:
        await call.accepted()
    seen = {call.id for call, _ in calls[:25]}
    forger.write_together(alice.id, [f"{id_[:16]}{other[16:]}" for id_ in seen for other in seen if id_ != other][:500])
    forger.write_together(alice.id, sorted(seen))
    await wait_until_async(lambda: all(outcomes for _, outcomes in calls[:25]))
    assert not any(outcomes for _, outcomes in calls[25:])
    await alice.close()


async def test_the_keys_of_large_bodies_cannot_be_guessed(site: Site, broker: Guarded) -> None:
    backend = await site.declare()
    await site.declare("copy")
    await site.registry.change(
        lambda seen: Change(endpoints={"f": EndpointRecord(name="f", traffic={"f": 1.0}, shadows={"copy": 1.0})})
    )
    alice = RequestClient(broker.url("alice"), "default")
    await alice.open()
    outcomes: list[CallOutcome] = []
    await wait_until_async(lambda: alice.snapshot.endpoints.get("f") and alice.snapshot.endpoints["f"].shadows)
    call = alice.dispatch(alice.snapshot.endpoints["f"], Header(codec="bytes"), bytes(LARGE + 1), outcomes.append)
    await call.accepted()
    with Redis.from_url(broker.url("admin")) as redis:
        await wait_until_async(lambda: ids_on(redis, KEYS.requests("copy")))
        (copy,) = ids_on(redis, KEYS.requests("copy"))
        assert redis.exists(KEYS.body("f", call.id), KEYS.body("copy", copy)) == 2
    assert copy != call.id
    for id_ in (call.id, copy):
        assert len(id_) == 32
        assert alice.id not in id_
    assert backend.tag == "f"
    call.cancel()
    await alice.close()


async def begin_job(url: str, items: int) -> None:
    """Have the items of the job ``j`` queued, and leave it."""

    async def collect_all() -> None:
        async for _ in handles.BatchProducer(url, "f", job="j").as_completed(range(items)):
            pass

    task = asyncio.create_task(collect_all())
    with Redis.from_url(url.replace("alice", "admin")) as redis:
        await wait_until_async(lambda: redis.xlen(KEYS.batch("f")) == items)
    task.cancel()
    await asyncio.wait([task])


async def test_results_without_the_id_of_an_item_are_ignored_by_a_job(
    site: Site, broker: Guarded, forger: Forger
) -> None:
    await site.declare()
    await begin_job(broker.url("alice"), 5)
    caller = Keys.caller("alice", Keys.job_name("j"))
    with Redis.from_url(broker.url("admin")) as redis:
        ids = ids_on(redis, KEYS.batch("f"))
        tried = guesses(caller, *(f"{ids[0].rpartition('-')[0]}-{n}" for n in range(1, 5)), *ids[0].split("-"))
        for id_ in tried:
            forger.write(caller, *forgeries(id_))
        forger.write_together(caller, tried)
        forger.write(caller, Reply(ids[4], codec="text", body=b"what the replica answered"))
        redis.delete(KEYS.batch("f"))
    await site.serve(echo)
    results = [result async for result in handles.BatchProducer(broker.url("alice"), "f", job="j").map(range(5))]
    assert [result.value for result in results] == [0, 1, 2, 3, "what the replica answered"]
    assert await asyncio.to_thread(broker.denied) == ["alice: command xrange"]


async def test_entries_that_a_job_did_not_send_are_not_its_items(site: Site, broker: Guarded) -> None:
    """Any caller may publish in another one's name, and the job's owner must not mistake that for an item."""
    await site.declare()
    caller = Keys.caller("proxy", Keys.job_name("j"))
    with Redis.from_url(broker.url("bob")) as redis:
        for n in range(3):
            entry = Entry(f"{caller}-{n}", caller, Header(endpoint="f", codec="json"), b'"forged"')
            redis.execute_command("XADD", KEYS.batch("f"), "*", *entry.fields())
    await site.serve(echo)
    producer = handles.BatchProducer(broker.url("proxy"), "f", job="j", window=10)  # may read the request streams
    assert [result.value async for result in producer.map(range(3))] == [0, 1, 2]
    assert broker.denied() == ["proxy: key penstock:default:{registry}:reports:jobs"]  # it has no jobs to report
