"""Users whose rules are too narrow: what they may not do is told as an error of ours, and nobody waits for ever."""

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock import handles
from penstock.broker.queue.leases import Lease
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.handles import AsyncServeHandle
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.connection import Connection
from penstock.handles.errors import BrokerRefused, BrokerUnavailable, NotPermitted, PenstockError
from penstock.proxy.proxy import Proxy
from tests.handles.site import Site, echo

CONNECTING = ("+ping", "+time", "+select", "+client|setname")
NOTHING = ("-@all", *CONNECTING)
CALLERS = (
    *("eval", "evalsha", "get", "hgetall", "pexpire", "pttl", "set", "unlink"),
    *("xadd", "xdel", "xlen", "xrange", "xread", "xrevrange", "xtrim"),
)
"""What callers do. A reply's stream is trimmed, and its expiry put off, as a courtesy."""
PATIENCE_S = 60.0

Limited = Callable[..., str]


@contextmanager
def limited(url: str, *rules: str, user: str = "guest") -> Generator[str]:
    """Give the URL of a user with these rules."""
    with Redis.from_url(url) as redis:
        redis.execute_command("ACL", "SETUSER", user, "reset", "on", ">word", "~*", "&*", *rules)
        try:
            yield url.replace("unix://", f"unix://{user}:word@")
        finally:
            redis.execute_command("ACL", "DELUSER", user)


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    site = Site(redis_url)
    site.serve(echo)
    yield site
    site.close()


def call(connection: Connection) -> Any:
    return connection.get_handle("ask").remote(1).result(timeout=PATIENCE_S)


def call_twice(connection: Connection) -> Any:
    return [call(connection), call(connection)]


def call_with_much(connection: Connection) -> Any:
    return connection.get_handle("ask").remote("x" * 300_000).result(timeout=PATIENCE_S)


def stream(connection: Connection) -> Any:
    answers: Any = connection.get_handle("ask").options(stream=True).remote(1)
    return list(answers)


def batch(connection: Connection) -> Any:
    return [result.get() for result in connection.batch("ask").as_completed(range(3))]


def job(connection: Connection) -> Any:
    return [result.get() for result in connection.batch("ask", job="j").map(range(3))]


def call_in_loop(connection: Connection) -> Any:
    async def asked() -> Any:
        handle = AsyncServeHandle(connection.redis_url, connection.instance, "ask")
        return await asyncio.wait_for(await handle.remote(1), PATIENCE_S)

    return asyncio.run(asked())


def look_at_dead_letters(connection: Connection) -> Any:
    return len(connection.dead_letters("model")), list(connection.dead_letters("model"))


def replay(connection: Connection) -> None:
    connection.dead_letters("model").replay("1-0")


def drop(connection: Connection) -> None:
    connection.dead_letters("model").drop("1-0")


TO_DEAD_LETTERS = (look_at_dead_letters, replay, drop)


@pytest.mark.parametrize(
    "use",
    [Connection.list_endpoints, call, call_twice, call_with_much, stream, batch, job, call_in_loop, *TO_DEAD_LETTERS],
)
def test_every_denied_command_raises_an_error_of_penstock(use: Callable[[Connection], Any], site: Site) -> None:
    refused: dict[str, NotPermitted] = {}
    for command in CALLERS:
        # A user of its own: the connection of a user is shared within the process, and goes on for a moment.
        with limited(site.url, "+@all", f"-{command}", user=f"no-{command}-to-{use.__name__}") as url:
            try:
                with handles.connect(url) as connection:
                    use(connection)
            except NotPermitted as e:
                refused[command] = e
            except PenstockError as e:
                if "has no dead letter" not in str(e):
                    raise
    assert {"eval", "get", "hgetall", "xread", "xrevrange"} <= set(refused)
    if use is call_twice:
        assert "evalsha" in refused  # the second time, the server knows the script
    assert all(
        command in error.message and error.user.startswith(f"no-{command}-to-") for command, error in refused.items()
    )


def test_the_message_names_the_user_the_command_and_the_page_of_the_rules(site: Site) -> None:
    with limited(site.url, *NOTHING) as url, pytest.raises(NotPermitted) as raised:
        handles.connect(url)
    said = str(raised.value)
    assert "the Redis user 'guest' may not do EVAL penstock:default:{guest@" in said
    assert f"at {site.url}: " in said
    assert "docs/security.md" in said
    assert "word" not in said


def test_a_user_that_may_not_connect_gets_the_page_of_the_rules(site: Site) -> None:
    with limited(site.url, "-@all") as url, pytest.raises(BrokerUnavailable, match=r"(?i)permissions.*security\.md"):
        handles.connect(url)


def test_a_batch_that_may_not_publish_ends_at_its_first_item(site: Site) -> None:
    """Rather than to ask for all others, or to wait for a broker that is there."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with (
        limited(site.url, "+@all", "-xlen") as url,
        handles.connect(url) as connection,
        pytest.raises(NotPermitted, match="xlen"),
    ):
        list(connection.batch("ask", window=10).as_completed(items()))
    assert taken < 1_000


async def test_http_clients_get_a_refusal_without_details_of_the_broker(redis_url: str) -> None:
    owner = await SharedClient.get(redis_url, "default")
    backend, endpoint = (
        BackendRecord(tag="f", version="1", code=""),
        EndpointRecord(name="e", route="/e", traffic={"f": 1.0}),
    )
    await owner.registry.change(lambda seen: Change({"f": backend}, {"e": endpoint}))
    with limited(redis_url, "+@all", "-xlen") as url:
        proxy = Proxy(url, "default", "p", {"port": 0})
        told = await proxy.ready()
        async with httpx.AsyncClient(base_url=str(told["url"]), timeout=PATIENCE_S) as http:
            answer = await http.get("/e")
        await proxy.drain(0.2)
    assert answer.status_code == 500
    assert answer.json() == {"error": {"type": "NotPermitted", "message": "the broker refused the request"}}
    await owner.registry.erase()
    await owner.close()


def test_a_denied_lease_raises_an_error_of_penstock(redis_url: str) -> None:
    with limited(redis_url, "+@all", "-set") as url:
        lease = Lease(url, "penstock:default:{f}:alive:1")
        with pytest.raises(NotPermitted, match=r"'guest' may not do EVAL penstock:default:\{f\}:alive:1"):
            lease.start()
        lease.stop()
    with limited(redis_url, *NOTHING) as url:
        lease = Lease(url.replace("word", "wrong"), "penstock:default:{f}:alive:1")
        with pytest.raises(BrokerUnavailable, match=r"(?i)username-password"):
            lease.start()
        lease.stop()


async def test_other_refusals_of_redis_raise_errors_of_penstock(redis_url: str) -> None:
    caller = await SharedClient.get(redis_url, "default")
    with Redis.from_url(redis_url) as redis:
        redis.set(caller.keys.backends, "no hash")
        with pytest.raises(BrokerRefused, match=r"refused EVAL.*WRONGTYPE"):
            await caller.registry.snapshot()
        redis.delete(caller.keys.backends)
    await caller.close()
