"""Every part of Penstock under the rules of ``docs/security.md``, and nothing beyond them."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from penstock import handles
from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.registry.reports import JobReport
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Header
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.errors import BrokerUnavailable, DeliveryLimitExceeded, Overloaded
from penstock.proxy.pages.admin_token import digest_of
from penstock.proxy.proxy import Proxy
from penstock.workers.executing.user_code import dump
from penstock.workers.retry import Retry
from penstock.workers.serving import Serving
from tests.guarded import DOCUMENT, Guarded, documented_rules
from tests.waiting import wait_until, wait_until_async

KEYS = Keys("default")
REQUESTS, BODY, REPLIES = KEYS.requests("f"), KEYS.body("f", "r"), KEYS.replies("bob@1")
OWN = KEYS.replies("alice@1")
TOKEN = "correct-horse-battery-staple"
CONFIG: dict[str, Any] = {"max_queued_requests": 10_000, "max_deliveries": 3}


def echo(request: Any) -> Any:
    return request.data


async def slowly(request: Any) -> Any:
    await asyncio.sleep(0.3)
    return request.data


class Site:
    """An instance whose every part is a user of its own."""

    def __init__(self, broker: Guarded, registry: Registry, parts: AsyncExitStack) -> None:
        self.broker, self.registry, self._parts = broker, registry, parts

    async def serve(self, target: Any, tag: str = "f", replicas: int = 1, **config: Any) -> list[Serving]:
        code = await self.registry.put_code(dump(target))
        backend = BackendRecord(tag=tag, version="1", code=code, config=BackendSpec(**{**CONFIG, **config}))
        endpoint = EndpointRecord(name=tag, route=f"/{tag}", methods=("GET", "POST"), traffic={tag: 1.0})
        await self.registry.change(lambda seen: Change({tag: backend}, {tag: endpoint}))
        started = [Serving(self.broker.url("replica"), "default", tag, f"{tag}#{n}") for n in range(replicas)]
        for replica in started:
            self._parts.push_async_callback(replica.drain, 0.0)
            await replica.ready()
        return started

    async def proxy(self) -> str:
        proxy = Proxy(self.broker.url("proxy"), "default", "p", {"port": 0})
        self._parts.push_async_callback(proxy.drain, 0.2)
        return str((await proxy.ready())["url"])

    async def declare(self, tag: str = "f", **config: Any) -> BackendRecord:
        """Make a backend and its endpoint, without anybody to serve it."""
        backend = BackendRecord(tag=tag, version="1", code="", config=BackendSpec(**{**CONFIG, **config}))
        endpoint = EndpointRecord(name=tag, traffic={tag: 1.0})
        await self.registry.change(lambda seen: Change({tag: backend}, {tag: endpoint}))
        return backend


@asynccontextmanager
async def open_site(broker: Guarded) -> AsyncGenerator[Site]:
    async with AsyncExitStack() as parts:
        connection = await RedisConnection(broker.url("owner")).open()
        parts.push_async_callback(connection.close)
        yield Site(broker, Registry(connection, KEYS), parts)


@pytest.fixture
def broker(guarded_by_users: Guarded) -> Guarded:
    return guarded_by_users


@pytest.fixture
async def site(broker: Guarded) -> AsyncIterator[Site]:
    async with open_site(broker) as site:
        yield site


def test_the_document_has_the_rules_of_every_role() -> None:
    assert list(documented_rules()) == ["owner", "alice", "proxy", "replica"]


def rules_for_the_admin_token() -> str:
    """Return the rules of the document that a proxy needs besides its own to replay and drop dead letters."""
    found = re.search(r"need these as well:\n\n```text\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return " ".join(found[1].split())


@asynccontextmanager
async def dashboard(site: Site, broker: Guarded, more_rules: str) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the admin port of a proxy whose user has ``more_rules`` besides those of a proxy."""
    rules = documented_rules()["proxy"].replace("user proxy on", "on").replace("{proxy@*}", "{clerk@*}")
    with Redis.from_url(broker.url("admin")) as redis:
        redis.execute_command("ACL SETUSER", "clerk", *selectors(f"{rules} {more_rules}"))
        options = {"port": 0, "admin_port": 0, "admin_token": digest_of(TOKEN)}
        proxy = Proxy(broker.url("clerk"), "default", "clerk", options)
        try:
            url, authorized = (await proxy.ready())["admin_url"], {"authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=url, headers=authorized, timeout=60) as http:
                yield http
        finally:
            await proxy.drain(0.2)
            redis.acl_deluser("clerk")


def selectors(rules: str) -> list[str]:
    """Return the rules of an ACL as the arguments of a command: each selector, in parentheses, is one."""
    return re.findall(r"\([^)]*\)|[^\s()]+", rules)


async def bury(site: Site, broker: Guarded, *, size: int) -> list[str]:
    """Make four submitted requests dead letters, and return their ids."""
    await site.declare(max_deliveries=1)

    def submit() -> None:
        with handles.connect(broker.url("alice")) as door:
            handle = door.get_handle("f")
            for n in range(4):
                handle.submit("x" * size, n=n)

    await asyncio.to_thread(submit)
    with Redis.from_url(broker.url("admin")) as redis:
        entries: Any = redis.xrange(REQUESTS)
        for _, fields in entries:
            redis.xadd(KEYS.dead("f"), {**fields, b"history": b'{"error": "died", "deliveries": []}'})
        redis.xtrim(REQUESTS, maxlen=0)
        letters: Any = redis.xrange(KEYS.dead("f"))
    return [letter[0].decode() for letter in letters]


@pytest.mark.parametrize("size", [8, LARGE + 1])
async def test_the_dashboard_replays_and_drops_with_the_rules_for_the_admin_token(
    site: Site, broker: Guarded, size: int
) -> None:
    ids = await bury(site, broker, size=size)
    page = "/-/dashboard/dead-letters"
    async with dashboard(site, broker, rules_for_the_admin_token()) as http:
        listed = (await http.get(page, params={"backend": "f"})).json()["dead_letters"]
        assert [letter["id"] for letter in listed] == ids[::-1]
        for name, some in (("replay", ids[:2]), ("drop", ids[2:])):
            for id_ in some:
                changed = await http.post(f"{page}/{name}", params={"backend": "f", "id": id_})
                assert changed.status_code == 200, changed.text
        async with http.stream("GET", "/-/dashboard/events") as events:
            assert await anext(events.aiter_lines()) == "event: state"
    with Redis.from_url(broker.url("admin")) as redis:
        assert (redis.xlen(KEYS.dead("f")), redis.xlen(KEYS.batch("f"))) == (0, 2)
    assert await asyncio.to_thread(broker.denied) == []


async def test_a_proxy_without_the_rules_for_the_admin_token_lists_dead_letters_and_changes_none(
    site: Site, broker: Guarded
) -> None:
    (id_, *_) = await bury(site, broker, size=8)
    async with dashboard(site, broker, "") as http:
        assert len((await http.get("/-/dashboard/dead-letters", params={"backend": "f"})).json()["dead_letters"]) == 4
        for name in ("replay", "drop"):
            refused = await http.post(f"/-/dashboard/dead-letters/{name}", params={"backend": "f", "id": id_})
            assert refused.status_code == 403
            assert "lacks a permission" in refused.json()["error"]["message"]
    assert await asyncio.to_thread(broker.denied)


async def test_callers_of_every_kind_are_answered(site: Site, broker: Guarded) -> None:
    await site.serve(echo)
    large = "x" * (LARGE + 1)

    def call() -> None:
        with handles.connect(broker.url("alice")) as door:
            handle = door.get_handle("f")
            assert handle.remote({"a": 1}).result(timeout=10) == {"a": 1}
            assert handle.remote(large).result(timeout=10) == large
            assert [result.value for result in door.batch("f").map(range(20))] == list(range(20))

    await asyncio.to_thread(call)
    with handles.connect(broker.url("alice")) as door:
        handle = door.get_handle("f", sync=False)
        assert await (await handle.remote(7)) == 7
        assert await (await handle.remote(large)) == large
    await (await SharedClient.get(broker.url("alice"), "default")).close()


async def test_callers_that_may_not_read_the_queue_are_refused_while_it_is_full(site: Site, broker: Guarded) -> None:
    await site.declare(max_queued_requests=2)
    await site.declare("g", max_queued_bytes=1024 * 1024)
    with handles.connect(broker.url("alice")) as door:
        full, narrow = (door.get_handle(name, sync=False) for name in "fg")
        calls = [await full.remote(n) for n in range(2)]
        with pytest.raises(Overloaded, match="max_queued_requests is 2"):
            await full.remote(2)
        for size in (100_000, LARGE + 1):
            sent = await asyncio.gather(
                *[narrow.remote("x" * size) for _ in range(12)], narrow.remote("small"), return_exceptions=True
            )
            refused = [call for call in sent if isinstance(call, BaseException)]
            calls += [call for call in sent if not isinstance(call, BaseException)]
            assert {type(error) for error in refused} == {Overloaded}
            assert "max_queued_bytes is 1048576" in str(refused[0])
        for call in calls:
            call.cancel()
    await (await SharedClient.get(broker.url("alice"), "default")).close()


async def test_a_proxy_serves_as_its_own_user(site: Site, broker: Guarded) -> None:
    await site.serve(echo)
    url = await site.proxy()
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.post("/f", json={"a": 1})).json() == {"a": 1}
        large = b"x" * (LARGE + 1)
        assert (await http.post("/f", content=large)).content == large
        assert (await http.get("/-/healthz")).status_code == 200

        async def has_counted() -> bool:
            return 'penstock_backend_served_total{backend="f"} 2\n' in (await http.get("/-/metrics")).text

        await wait_until_async(has_counted)


def reporting(request: Any) -> Any:
    request.report_progress({"size": len(request.data)})
    return request.data


async def test_submitted_requests_and_keys_need_no_more_than_the_rules(site: Site, broker: Guarded) -> None:
    await site.serve(reporting)
    await site.declare("idle", max_queued_requests=2)
    url = await site.proxy()
    large = "x" * (LARGE + 1)

    def call() -> str:
        with handles.connect(broker.url("alice")) as door:
            handle = door.get_handle("f")
            for body in ("small", large):
                submitted = handle.submit(body)
                assert submitted.result(timeout=10) == body
                assert submitted.status().status == "succeeded"
                assert not submitted.cancel()
                keyed = handle.options(idempotency_key=body[:9])
                assert keyed.remote(body).result(timeout=10) == keyed.remote(body).result(timeout=10) == body
            idle = door.get_handle("idle")
            waiting = [idle.submit(n) for n in range(2)]
            with pytest.raises(Overloaded):
                idle.submit(2)
            assert all(one.cancel() for one in waiting)
            return submitted.id

    id_ = await asyncio.to_thread(call)
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        assert (await http.get(f"/-/requests/{id_}/result")).text == large
        headers = {"prefer": "respond-async", "idempotency-key": "k"}
        location = (await http.post("/f", json="web", headers=headers)).headers["location"]
        assert (await http.get(f"{location}/result", headers={"prefer": "wait=10"})).text == "web"
        assert (await http.get(location)).json()["progress"] == {"size": 3}
        assert (await http.post("/f", json="web", headers={"idempotency-key": "k"})).text == "web"
        assert (await http.delete(location)).status_code == 409


def failing_once(request: Any) -> Any:
    key = request.data["n"]
    CALLS[key] = CALLS.get(key, 0) + 1
    if CALLS[key] == 1:
        raise Retry(after_s=request.data["after_s"])
    return key


CALLS: dict[int, int] = {}


async def test_retries_need_no_more_than_the_rules_also_when_another_replica_goes_on(
    site: Site, broker: Guarded
) -> None:
    CALLS.clear()
    first, _ = await site.serve("tests.security.test_acls:failing_once", replicas=2)

    def call() -> list[Any]:
        with handles.connect(broker.url("alice")) as door, Redis.from_url(broker.url("admin")) as redis:
            handle = door.get_handle("f")
            assert handle.remote({"n": 0, "after_s": 0.0}).result(timeout=20) == 0
            futures = [handle.remote({"n": n, "after_s": 2.0}) for n in range(1, 9)]
            wait_until(lambda: len(redis.keys(KEYS.retry("f", "*"))) == 8)
            asyncio.run_coroutine_threadsafe(first.drain(5.0), loop).result(20)
            values = [future.result(timeout=20) for future in futures]
            wait_until(lambda: not redis.keys(KEYS.retry("f", "*")))
            return values

    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(call) == list(range(1, 9))
    assert set(CALLS.values()) == {2}


async def test_a_caller_cannot_write_results_and_a_replica_cannot_read_them(site: Site, broker: Guarded) -> None:
    result, record = KEYS.result("f", "0" * 48), KEYS.kept("f", "0" * 48)
    with Redis.from_url(broker.url("alice")) as redis:
        for command in ("DEL", "UNLINK", "DUMP"):
            assert _is_denied(redis, command, result), command
            assert _is_denied(redis, command, record), command
        assert _is_denied(redis, "SET", result, "forged")
        assert _is_denied(redis, "HGETALL", record)
    with Redis.from_url(broker.url("replica")) as redis:
        assert _is_denied(redis, "GET", result)
        assert _is_denied(redis, "GETRANGE", result, 0, 9)
        assert _is_denied(redis, "GET", KEYS.result_body("f", "0" * 48))
        assert _is_denied(redis, "GET", KEYS.idempotency_key("f", "digest"))
    assert await asyncio.to_thread(broker.denied)


def published(redis: Any) -> int:
    """Return how many requests were published so far, settled ones included."""
    return int(redis.xinfo_stream(KEYS.requests("f"))["entries-added"])


async def test_a_proxy_rides_through_a_broken_connection_and_runs_nothing_twice(site: Site, broker: Guarded) -> None:
    await site.serve(slowly, max_concurrent_queries=4)
    url = await site.proxy()
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        answers = [asyncio.ensure_future(http.post("/f", json=n)) for n in range(8)]
        with Redis.from_url(broker.url("admin")) as redis:
            await wait_until_async(lambda: published(redis) == 8)
            broker.cut("proxy")
            assert [(await answer).json() for answer in answers] == list(range(8))
            added = published(redis)
    assert added == 8  # none was published again


async def test_a_cancelled_request_does_not_run(site: Site, broker: Guarded) -> None:
    seen: list[int] = []
    await site.serve(slowly, max_concurrent_queries=1)

    def call() -> None:
        with handles.connect(broker.url("alice")) as door, Redis.from_url(broker.url("admin")) as redis:
            handle = door.get_handle("f")
            futures = [handle.remote(n) for n in range(3)]
            wait_until(lambda: published(redis) == 3)
            assert futures[2].cancel()
            seen.extend(future.result(timeout=10) for future in futures[:2])
            wait_until(lambda: redis.xlen(KEYS.requests("f")) == 0)

    await asyncio.to_thread(call)
    assert seen == [0, 1]


async def test_a_caller_that_may_not_read_streams_rides_through_a_broken_connection(
    site: Site, broker: Guarded
) -> None:
    """It publishes again what it cannot look for: every request is answered, some may run twice."""
    await site.serve(slowly, max_concurrent_queries=4)

    def call() -> list[Any]:
        with handles.connect(broker.url("alice")) as door, Redis.from_url(broker.url("admin")) as redis:
            handle = door.get_handle("f")
            futures = [handle.remote(n) for n in range(20)]
            wait_until(lambda: published(redis) == 20)
            broker.cut("alice")
            results = [future.result(timeout=20) for future in futures]
            wait_until(lambda: redis.xlen(KEYS.requests("f")) == 0)
            return results

    assert await asyncio.to_thread(call) == list(range(20))
    assert await asyncio.to_thread(broker.denied) == ["alice: command xrange"]


async def test_a_continued_batch_job_sends_the_items_again_that_it_cannot_look_up(
    site: Site, broker: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    await site.serve(echo)

    def twice() -> list[list[Any]]:
        with handles.connect(broker.url("alice")) as door:
            return [[result.value for result in door.batch("f", job="j").map(range(20))] for _ in range(2)]

    assert await asyncio.to_thread(twice) == [list(range(20))] * 2
    assert "cannot read which items of job 'j' are queued for backend 'f'" in caplog.text
    (report,) = (await site.registry.get_reports(JobReport)).values()
    assert (report.state, report.done) == ("finished", 20)
    assert await asyncio.to_thread(broker.denied) == ["alice: command xrange"]


async def test_the_claims_of_a_dead_replica_are_redelivered_and_become_dead_letters_at_last(
    site: Site, broker: Guarded
) -> None:
    await site.serve(echo, "idle")

    def call() -> None:
        with Redis.from_url(broker.url("admin")) as redis, handles.connect(broker.url("alice")) as door:
            future = door.get_handle("f").remote(1)
            redis.xgroup_create(KEYS.requests("f"), "replicas", "0", mkstream=True)
            wait_until(lambda: redis.xreadgroup("replicas", "ghost", {KEYS.requests("f"): ">"}))
            loop.call_soon_threadsafe(died.set)
            with pytest.raises(DeliveryLimitExceeded):
                future.result(timeout=20)
        with handles.connect(broker.url("owner")) as owner:
            letters = owner.dead_letters("f")
            letter = next(iter(letters))
            assert letters.body(letter) == b"1"
            letters.replay(letter.id)
            assert len(letters) == 0

    died, loop = asyncio.Event(), asyncio.get_running_loop()
    await site.declare()
    calling = asyncio.ensure_future(asyncio.to_thread(call))
    await died.wait()
    await site.serve(echo, max_deliveries=1)
    await calling


READING = [
    *(("XRANGE", key, "-", "+") for key in (REQUESTS, KEYS.batch("f"), KEYS.dead("f"), KEYS.signals("f"), REPLIES)),
    ("XREVRANGE", REQUESTS, "+", "-"),
    ("XREAD", "STREAMS", REQUESTS, "0"),
    ("XREAD", "STREAMS", OWN, REQUESTS, "0", "0"),
    ("XREAD", "STREAMS", REPLIES, "0"),
    ("XREADGROUP", "GROUP", "replicas", "me", "STREAMS", REQUESTS, ">"),
    ("XPENDING", REQUESTS, "replicas"),
    ("XCLAIM", REQUESTS, "replicas", "me", 0, "1-0"),
    ("XAUTOCLAIM", REQUESTS, "replicas", "me", 0, "0"),
    ("XINFO", "STREAM", REQUESTS, "FULL"),
    ("XINFO", "CONSUMERS", REQUESTS, "replicas"),
    ("XGROUP", "CREATE", REQUESTS, "mine", "0"),
    ("DUMP", REQUESTS),
    ("COPY", REQUESTS, OWN),
    ("RENAME", REQUESTS, OWN),
    ("RENAME", BODY, OWN),
    ("SORT", REQUESTS, "BY", "nosort", "STORE", OWN),
    ("OBJECT", "ENCODING", REQUESTS),
    ("MIGRATE", "127.0.0.1", 1, REQUESTS, 0, 1),
    ("GET", BODY),
    ("GETDEL", BODY),
    ("GETEX", BODY),
    ("GETRANGE", BODY, 0, -1),
    ("MGET", OWN, BODY),
    ("SET", BODY, "", "GET"),
    ("GET", KEYS.reply_body("bob@1", "r")),
    ("GET", KEYS.job("bob@job:j")),
    ("GET", KEYS.code("digest")),
    ("GET", KEYS.settings),
    ("HGETALL", KEYS.reports("proxies")),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("RANDOMKEY",),
]
WRITING = [
    ("HSET", KEYS.backends, "f", "{}"),
    ("HSET", KEYS.endpoints, "f", "{}"),
    ("HDEL", KEYS.backends, "f"),
    ("HSET", KEYS.reports("replicas"), "f#1", "{}"),
    ("INCR", KEYS.version),
    ("SET", KEYS.version, 7),
    ("SET", KEYS.code("digest"), "code"),
    ("SET", KEYS.settings, "{}"),
    ("SET", KEYS.owner, "me"),
    ("XADD", KEYS.feed, "*", "version", 7),
    ("DEL", KEYS.backends),
    ("UNLINK", KEYS.backends),
    ("RENAME", OWN, KEYS.backends),
    ("COPY", OWN, KEYS.code("digest")),
    ("XADD", REPLIES, "*", "v", "1"),
    ("UNLINK", REPLIES),
    ("SET", KEYS.alive("f", "f#1"), 1),
    ("DEL", KEYS.alive("f", "f#1")),
]
RULING = [
    ("FLUSHALL",),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "alice", "+@all"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "USER", "bob"),
    ("MONITOR",),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LIST"),
    ("SAVE",),
    ("REPLICAOF", "NO", "ONE"),
    ("PUBLISH", "c", "m"),
    ("SUBSCRIBE", "c"),
]


def test_a_caller_is_denied_every_command_of_other_roles(broker: Guarded) -> None:
    """Neither by itself nor in a script."""
    with Redis.from_url(broker.url("alice")) as redis:
        for command in (*READING, *WRITING, *RULING):
            assert _is_denied(redis, *command), command
            with pytest.raises(ResponseError):
                redis.execute_command("EVAL", "return redis.call(unpack(ARGV))", 0, *command)
    assert broker.denied()


@pytest.mark.parametrize("user", ["proxy", "replica"])
def test_proxies_and_replicas_may_not_write_the_registry(user: str, broker: Guarded) -> None:
    own = KEYS.reports("replicas")
    with Redis.from_url(broker.url(user)) as redis:
        for command in (command for command in WRITING if "{registry}" in str(command)):
            theirs = (KEYS.reports("proxies") if user == "replica" and part == own else part for part in command)
            assert _is_denied(redis, *theirs), command
    assert broker.denied()


@pytest.mark.parametrize("user", ["proxy", "replica"])
def test_only_the_caller_of_a_batch_job_can_read_its_secret(user: str, broker: Guarded) -> None:
    with Redis.from_url(broker.url(user)) as redis:
        for command in ("GET", "GETDEL", "DUMP", "TYPE", "DEL"):
            assert _is_denied(redis, command, KEYS.job("alice@job:j")), command
        assert _is_denied(redis, "SET", KEYS.job("alice@job:j"), "{}")
    assert broker.denied()


def _is_denied(redis: Any, *command: Any) -> bool:
    try:
        redis.execute_command(*command)
    except NoPermissionError:
        return True
    return False


async def test_a_caller_cannot_read_the_requests_of_other_callers(site: Site, broker: Guarded) -> None:
    """And what it tries leaves that as it was."""
    backend = await site.declare()
    before = await site.registry.snapshot()
    bob = RequestClient(broker.url("bob"), "default")
    await bob.open()
    outcomes: list[Any] = []
    call = bob.send(backend, Header(), b"x" * (LARGE + 1), outcomes.append)
    await call.accepted()

    def try_all() -> None:
        with Redis.from_url(broker.url("alice")) as redis:
            for command in (*READING, *WRITING, *RULING):
                own = [str(part).replace(REPLIES, KEYS.replies(bob.id)) for part in command]
                own = [part.replace(BODY, KEYS.body("f", call.id)) for part in own]
                with pytest.raises(NoPermissionError):
                    redis.execute_command(*own)

    await asyncio.to_thread(try_all)
    assert (await site.registry.snapshot()) == before
    await asyncio.to_thread(broker.denied)
    await site.serve(echo)
    await wait_until_async(lambda: outcomes)
    assert outcomes[0].body == b"x" * (LARGE + 1)
    await bob.close()


async def test_the_id_of_a_caller_begins_with_its_user(broker: Guarded) -> None:
    assert RequestClient(broker.url("alice"), "default").id.startswith("alice@")
    assert "@" not in RequestClient("redis://:secret@localhost", "default").id
    assert RequestClient("redis://a%40b%7D:secret@localhost", "default").id.startswith("a%40b%7D@")


def test_a_rejected_login_raises_at_once_without_the_password(broker: Guarded) -> None:
    with pytest.raises(BrokerUnavailable, match=r"(?i)username-password") as raised:
        handles.connect(broker.url("alice", "wrong-one"))
    assert "wrong-one" not in str(raised.value)
    assert broker.denied()


def test_a_server_with_an_unknown_certificate_is_refused(broker: Guarded) -> None:
    url = f"rediss://alice:secret@localhost:{broker.port}"
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        handles.connect(url)


def test_a_server_with_another_name_in_its_certificate_is_refused(broker: Guarded) -> None:
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        handles.connect(broker.url("alice").replace("localhost", "127.0.0.1"))
