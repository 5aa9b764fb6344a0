"""Errors, HTTP responses, logs and listings show of a call: its request id, and nothing that answers it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock import handles
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Part, Reply
from penstock.broker.wire.requests import Header
from penstock.handles.calls.call import Call
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.errors import (
    DeliveryLimitExceeded,
    NotPermitted,
    PenstockError,
    RequestCancelled,
    StreamBroken,
    WireError,
    to_wire,
)
from penstock.handles.replies.response import result_of
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site, echo
from tests.security.test_refusals import limited
from tests.serve.cli.command_line import command_line
from tests.support.waiting import wait_until_async

KEYS = Keys(INSTANCE)


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    site = Site(redis_url)
    yield site
    site.close()


@pytest.fixture
async def caller(site: Site) -> AsyncIterator[RequestClient]:
    site.declare()
    caller = RequestClient(site.url, INSTANCE)
    await caller.open()
    yield caller
    await caller.close()


def ask(caller: RequestClient, **header: Any) -> tuple[Call, list[Any]]:
    """Send a request to a backend that nobody serves; return it, and where its outcome comes."""
    outcomes: list[Any] = []
    header = {"codec": "bytes", **header}
    return caller.dispatch(caller.snapshot.endpoints["ask"], Header(**header), b"x", outcomes.append), outcomes


def write(site: Site, caller: RequestClient, *replies: Reply | Part) -> None:
    with Redis.from_url(site.url) as redis:
        for reply in replies:
            redis.execute_command("XADD", KEYS.replies(caller.id), "*", *reply.fields())


def queued(redis: Any) -> list[tuple[str, str]]:
    """Return the caller and the id of each call that waits."""
    return [(fields[b"by"].decode(), fields[b"id"].decode()) for _, fields in redis.xrange(KEYS.requests("model"))]


def lose(redis: Any) -> None:
    """Claim what waits, as a replica would that is gone now."""
    if not redis.exists(KEYS.requests("model")) or not redis.xinfo_groups(KEYS.requests("model")):
        redis.xgroup_create(KEYS.requests("model"), "replicas", "0", mkstream=True)
    assert redis.xreadgroup("replicas", "ghost", {KEYS.requests("model"): ">"})


async def test_a_poison_request_is_named_by_its_request_id(
    site: Site, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(site.declare, route="/ask")
    proxy = Proxy(redis_url, INSTANCE, "p", {"port": 0, "debug": True})
    url = str((await proxy.ready())["url"])
    with Redis.from_url(redis_url) as redis:
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            asked = asyncio.ensure_future(http.get("/ask", headers={"X-Request-Id": "web-1"}))
            with await asyncio.to_thread(handles.connect, redis_url) as connection:
                future = await connection.get_handle("ask", sync=False).remote(1)
                await wait_until_async(lambda: len(queued(redis)) == 2)
                secrets = [part for call in queued(redis) for part in call]
                lose(redis)
                await asyncio.to_thread(site.serve, echo, max_deliveries=1)
                response = await asked
                with pytest.raises(DeliveryLimitExceeded) as raised:
                    await future
        listed = await asyncio.to_thread(listing, redis_url)
    await proxy.drain(0.2)

    assert response.status_code == 500
    assert "died with request 'web-1'" in response.json()["error"]["message"]
    error = raised.value
    assert error.request_id.startswith("call-")
    for shown in ("web-1", error.request_id):
        assert shown in listed
        assert shown in caplog.text
    everything = [response.text, *response.headers.values(), str(error), repr(error), str(to_wire(error))]
    for shown in (*everything, listed, caplog.text):
        assert not [secret for secret in secrets if secret in shown]


def listing(url: str) -> str:
    """Return what can be seen of the dead letters of the backend, in Python and on the command line."""
    with handles.connect(url) as connection:
        letters = list(connection.dead_letters("model"))
        seen = repr(letters) + str([letter.error for letter in letters])
    commands = [["list", "model"], ["list", "model", "--json"]]
    commands += [["show", "model", letter.id, *json] for letter in letters for json in ([], ["--json"])]
    for command in commands:
        seen += subprocess.run(
            command_line("dead", *command, "--redis-url", url),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    return seen


async def test_a_replayed_dead_letter_keeps_its_request_id(site: Site, caller: RequestClient) -> None:
    call, outcomes = ask(caller)
    await call.accepted()
    bury(site.url)
    await asyncio.to_thread(site.serve, echo)

    def replay() -> None:
        with handles.connect(site.url) as connection:
            letters = connection.dead_letters("model")
            letters.replay(next(iter(letters)).id)

    await asyncio.to_thread(replay)
    await wait_until_async(lambda: outcomes)
    assert outcomes[0].body == b"x"


def bury(url: str) -> None:
    with Redis.from_url(url) as redis:
        entries: Any = redis.xrange(KEYS.requests("model"))
        for _, fields in entries:
            redis.xadd(KEYS.dead("model"), {**fields, b"history": b"{}"})
        redis.delete(KEYS.requests("model"))


def fail_to_read(call: Call) -> list[Reply | Part]:
    return [Reply(call.id, large=True)]


def skip_a_part(call: Call) -> list[Reply | Part]:
    return [Part(call.id, 0), Part(call.id, 2)]


def send_parts(call: Call) -> list[Reply | Part]:
    return [Part(call.id, 0)]


def pickle(call: Call) -> list[Reply | Part]:
    return [Reply(call.id, codec="pickle")]


async def read(outcome: Any, *, in_parts: bool) -> None:
    if not in_parts:
        result_of(outcome)
    while await outcome.read():
        pass


@pytest.mark.parametrize("request_id", ["web-1", ""])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(fail_to_read, WireError), (skip_a_part, StreamBroken), (send_parts, WireError), (pickle, WireError)],
)
async def test_an_error_about_a_reply_names_the_request_and_not_the_call(
    site: Site,
    caller: RequestClient,
    request_id: str,
    make: Callable[[Call], list[Reply | Part]],
    kind: type[PenstockError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    call, outcomes = ask(caller, request_id=request_id, window=1_000)
    await call.accepted()
    write(site, caller, *make(call))
    await wait_until_async(lambda: outcomes)
    with pytest.raises(kind) as raised:
        await read(outcomes[0], in_parts=make is skip_a_part)
    assert call.shown_id == request_id or not request_id
    assert call.shown_id in str(raised.value)
    assert call.id not in f"{raised.value!r}{raised.value}{to_wire(raised.value)}{caplog.text}"


async def test_a_cancelled_request_is_named_by_its_request_id(site: Site, caller: RequestClient) -> None:
    asked = [ask(caller), ask(caller, request_id="web-1")]
    await caller.close()
    for call, outcomes in asked:
        (error,) = outcomes
        assert isinstance(error, RequestCancelled)
        assert error.request_id == call.shown_id
        assert call.id not in repr(error)


async def test_a_refusal_by_redis_names_the_command_without_the_caller_and_the_call(site: Site) -> None:
    site.declare()
    with limited(site.url, "+@all", "-get") as url:
        caller = RequestClient(url, INSTANCE)
        with limited_again(site.url, "+get"):
            await caller.open()
        call, outcomes = ask(caller)
        await call.accepted()
        write(site, caller, Reply(call.id, large=True))
        await wait_until_async(lambda: outcomes)
        await caller.close()
    (error,) = outcomes
    assert isinstance(error, NotPermitted)
    assert error.command == "GET penstock:default:{guest@...}:body:..."
    assert call.id not in repr(error)
    assert caller.id not in repr(error)


@contextmanager
def limited_again(url: str, rule: str) -> Generator[None]:
    """Give the user of `limited` one more right for a while."""
    with Redis.from_url(url) as redis:
        redis.execute_command("ACL", "SETUSER", "guest", rule)
        yield
        redis.execute_command("ACL", "SETUSER", "guest", rule.replace("+", "-"))
