import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import BrokerRefused, BrokerUnavailable, ConfigError
from penstock.broker.transport.commands import Script
from penstock.broker.transport.connection import FateUnknown, RedisConnection
from penstock.broker.transport.url import shown_url
from tests.broker.conftest import Connect
from tests.support.waiting import wait_until, wait_until_async

ECHO = Script("""#!lua flags=no-writes
return ARGV[1]
""")


@asynccontextmanager
async def stopped(server: EmbeddedServer) -> AsyncGenerator[None]:
    """A server that receives commands and does not answer."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # the test killed it
            os.kill(pid, signal.SIGCONT)


async def kill(server: EmbeddedServer, connection: RedisConnection) -> None:
    """Kill the server, and return when ``connection`` has noticed it. The server is restarted."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await wait_until_async(lambda: not connection.connected)


# -- many at once


async def test_each_of_many_senders_gets_its_own_reply(broker_url: str, connect: Connect) -> None:
    connection = await connect(broker_url)
    replies = await asyncio.gather(*[connection.send("ECHO", str(n)) for n in range(2_000)])
    assert replies == [str(n).encode() for n in range(2_000)]


async def test_an_error_reaches_only_its_own_command(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)
    before, wrong, after = (
        connection.send("ECHO", "1"),
        connection.send("NO-SUCH-COMMAND"),
        connection.send("ECHO", "2"),
    )
    with pytest.raises(BrokerRefused, match="NO-SUCH-COMMAND"):
        await wrong
    assert (await before, await after) == (b"1", b"2")


async def test_a_reply_larger_than_a_read_arrives_whole(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)
    large = os.urandom(3_000_000)
    assert await connection.send("ECHO", large) == large


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, 3_000_000])
async def test_a_bulky_command_arrives_like_any_other(redis_url: str, connect: Connect, size: int) -> None:
    connection = await connect(redis_url)
    value = os.urandom(size)
    received: list[object] = []
    connection.post(received.append, "ECHO", "first")
    connection.post(received.append, "ECHO", value, bulky=True, bulky_reply=True)
    for _ in range(2):  # whole, and by its digest
        connection.post_script(received.append, ECHO, [], [value, "é", 7], bulky=True)
    assert await connection.send("ECHO", "last") == b"last"
    assert received == [b"first", value, value, value]


async def test_flush_if_idle_sends_a_command_before_the_end_of_the_tick(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)
    reply = connection.send("SET", "hurried", "1", "PX", 60_000)
    connection.flush_if_idle()
    with Redis.from_url(redis_url) as other:  # it blocks the loop, so that this tick does not end
        wait_until(lambda: other.get("hurried") == b"1")
    behind = connection.send("ECHO", "behind")
    connection.flush_if_idle()
    assert await reply == b"OK"
    assert await behind == b"behind"


async def test_commands_are_carried_out_in_the_order_they_were_sent(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)
    received: list[bytes] = []
    for n in range(100):
        connection.post(received.append, "ECHO", str(n))
        if n % 10 == 0:
            await asyncio.sleep(0)
    await connection.send("PING")
    assert received == [str(n).encode() for n in range(100)]


async def test_a_callback_that_raises_does_not_affect_the_next_command(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)

    def fail(reply: Any) -> None:
        raise RuntimeError("on purpose")

    connection.post(fail, "PING")
    assert await connection.send("ECHO", "x") == b"x"


# -- cancellation (redis-py#2624, redis-py#2666)


async def test_the_reply_to_a_cancelled_command_never_reaches_another(redis_url: str, connect: Connect) -> None:
    connection = await connect(redis_url)

    async def ask(n: int) -> None:
        assert await connection.send("ECHO", str(n)) == str(n).encode()

    for round_ in range(20):
        tasks = [asyncio.ensure_future(ask(1000 * round_ + n)) for n in range(50)]
        for pause in range(round_ % 4):
            await asyncio.sleep(0.0002 * pause)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None for result in done[1::2])


async def test_cancelling_open_leaves_no_connection(server: EmbeddedServer) -> None:
    async with stopped(server):
        opening = asyncio.ensure_future(RedisConnection(server.url).open())
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert asyncio.all_tasks() == {asyncio.current_task()}


# -- scripts


async def test_a_script_is_sent_whole_to_a_server_that_does_not_have_it(broker_url: str, connect: Connect) -> None:
    connection = await connect(broker_url)
    await connection.send("SCRIPT", "FLUSH")
    assert await connection.run_script(ECHO, [], ["once"]) == b"once"
    assert await connection.send("SCRIPT", "EXISTS", ECHO.digest) == [1]
    await connection.send("SCRIPT", "FLUSH")
    replies = await asyncio.gather(*[connection.run_script(ECHO, [], [str(n)]) for n in range(50)])
    assert replies == [str(n).encode() for n in range(50)]


# -- the server dies


async def test_repeatable_commands_are_sent_again_after_the_server_was_killed(
    server: EmbeddedServer, connect: Connect
) -> None:
    connection = await connect(server.url)
    async with stopped(server):  # so that nothing is answered before it dies
        asked = [connection.send("ECHO", str(n), repeat=True) for n in range(20)]
        asked += [connection.run_script(ECHO, [], [str(n)], repeat=True) for n in range(20, 40)]
        await asyncio.sleep(0)  # the write of this tick
        await kill(server, connection)
        assert await asyncio.wait_for(asyncio.gather(*asked), 20) == [str(n).encode() for n in range(40)]


async def test_a_command_that_must_not_be_repeated_fails_with_an_unknown_fate(
    server: EmbeddedServer, connect: Connect
) -> None:
    connection = await connect(server.url)
    async with stopped(server):
        asked = connection.send("INCR", "n")
        await asyncio.sleep(0)
        await kill(server, connection)
        with pytest.raises(FateUnknown):
            await asked
        await wait_until_async(lambda: connection.connected)


async def test_a_command_that_was_never_sent_waits_for_the_server(server: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(server.url)
    await kill(server, connection)
    assert await connection.send("ECHO", "later") == b"later"


async def test_commands_that_are_sent_again_keep_their_order(server: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(server.url)
    async with stopped(server):
        sent = [connection.send("RPUSH", "list", n, repeat=True) for n in range(10)]
        await asyncio.sleep(0)
        await kill(server, connection)
    waiting = [connection.send("RPUSH", "list", n) for n in range(10, 20)]
    await asyncio.gather(*sent, *waiting)
    assert await connection.send("LRANGE", "list", 0, -1) == [str(n).encode() for n in range(20)]


async def test_commands_wait_at_the_start_of_an_outage_and_fail_at_once_later(
    server: EmbeddedServer, connect: Connect
) -> None:
    connection = await connect(server.url, patience_s=0.5)
    server.stop()
    await wait_until_async(lambda: not connection.connected)
    gone_at = time.monotonic()
    first = connection.send("PING", repeat=True)
    await asyncio.sleep(0.1)
    second = connection.send("PING")
    with pytest.raises(BrokerUnavailable, match="is unavailable"):
        await first
    assert time.monotonic() - gone_at > 0.3
    with pytest.raises(BrokerUnavailable):
        await second
    # The time limit is that of the outage: once it is over, commands fail at once.
    asked_at = time.monotonic()
    for _ in range(20):
        with pytest.raises(BrokerUnavailable) as caught:
            await connection.send("PING", repeat=True)
        assert caught.value.retry_after_s > 0
    assert time.monotonic() - asked_at < 0.3


async def test_each_outage_has_its_own_time_limit(server: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(server.url)
    connection.patience_s = 0.0
    await kill(server, connection)
    with pytest.raises(BrokerUnavailable):
        await connection.send("PING")
    await wait_until_async(lambda: connection.connected)
    connection.patience_s = 20.0
    await kill(server, connection)
    assert await connection.send("ECHO", "waited", repeat=True) == b"waited"


async def test_a_patient_command_waits_without_a_limit(server: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(server.url)
    connection.patience_s = 0.0
    await kill(server, connection)
    impatient, patient = connection.send("PING"), connection.send("ECHO", "at last", patient=True)
    with pytest.raises(BrokerUnavailable):
        await impatient
    assert await patient == b"at last"


async def test_a_hook_runs_after_each_reconnect(server: EmbeddedServer, connect: Connect) -> None:
    connection = RedisConnection(server.url)
    received: list[bytes] = []

    async def hook() -> None:
        received.append(await connection.send("ECHO", "back"))

    connection.on_reconnect(hook)
    await connection.open()
    for _ in range(2):
        before = len(received)
        await kill(server, connection)
        await wait_until_async(lambda: len(received) > before)  # noqa: B023 - it is asked in this round
    assert received == [b"back", b"back"]
    await connection.close()


@pytest.mark.slow
async def test_a_silent_server_counts_as_dead(server: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(server.url)
    async with stopped(server):
        asked = connection.send("INCR", "n")
        with pytest.raises(FateUnknown, match="no answer for"):
            await asyncio.wait_for(asked, 20)
    assert await connection.send("ECHO", "well again") == b"well again"


async def test_a_blocked_loop_does_not_make_the_server_look_dead(
    redis_url: str, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    connection = await connect(redis_url)
    blocked = connection.send("BLPOP", "nothing", 8)
    await asyncio.sleep(0.1)
    time.sleep(6.5)  # noqa: ASYNC251 - what user code does
    with caplog.at_level(logging.WARNING):
        assert await blocked is None
    assert connection.connected
    assert "lost the broker" not in caplog.text


async def test_the_clock_of_the_broker_is_known(broker_url: str, connect: Connect) -> None:
    connection = await connect(broker_url)
    before_ms = connection.now_ms()
    seconds, micros = await connection.send("TIME")
    told_ms = int(seconds) * 1000 + int(micros) / 1000
    assert before_ms - 50 < told_ms < connection.now_ms() + 50


# -- refused, wrong, closed


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://localhost", "it must begin with redis://"),
        ("localhost:6379", "it must begin with redis://"),
        ("", "it must begin with redis://"),
        ("redis://localhost:port", "cannot be read"),
        ("redis://localhost/first", "the database 'first' must be a number"),
        ("redis://localhost?db=first", "cannot be read"),
        ("redis://localhost?frobnicate=1", "the option 'frobnicate'"),
        ("redis://localhost?ssl_ca_certs=x", "the option 'ssl_ca_certs'"),
        ("rediss://localhost?ssl_cert_reqs=perhaps", "are not Redis's"),
        ("unix://", "it has no path"),
    ],
)
def test_a_url_that_is_not_redis_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RedisConnection(url)


def test_a_url_that_is_not_a_string_is_a_type_error() -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="a Redis URL must be a str, not NoneType"):
        RedisConnection(nothing)


async def test_options_of_other_clients_in_the_url_are_ignored(redis_url: str, connect: Connect) -> None:
    url = f"{redis_url}?decode_responses=true&socket_timeout=0.001&max_connections=1&protocol=3&client_name=x"
    connection = await connect(url)
    assert await connection.send("ECHO", "x") == b"x"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:geheim@127.0.0.1:1/0",
        "redis://user:geheim@127.0.0.1:1?db=0",
        "redis://127.0.0.1:1?password=geheim",
        "redis://:a/geheim@127.0.0.1:1",
        "redis://:a?geheim@127.0.0.1:1",
        "redis://:a#geheim@127.0.0.1:1",
        "redis://:geheim:b@127.0.0.1:port",
        "http://:geheim@127.0.0.1:1",
        "unix://:geheim@/nowhere/broker.sock",
        "user:geheim@127.0.0.1:1",
        "redis:user:geheim@127.0.0.1:1",
    ],
)
async def test_a_password_is_never_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ConfigError, BrokerUnavailable)) as caught:
        await RedisConnection(url, patience_s=0.1).open()
    text = f"{caught.value!r} {caught.value} {shown_url(url)} {caplog.text}"
    assert "geheim" not in text


@pytest.mark.slow
async def test_a_refused_connection_is_an_unavailable_broker_with_the_reason() -> None:
    with pytest.raises(BrokerUnavailable, match=r"redis://127\.0\.0\.1:1 is unavailable: .*111 connecting to"):
        await RedisConnection("redis://127.0.0.1:1", patience_s=2.0).open()


async def test_an_invalid_host_is_an_unavailable_broker() -> None:
    with pytest.raises(BrokerUnavailable):
        await RedisConnection(f"redis://{'x' * 80}.invalid", patience_s=0.5).open()


@pytest.fixture
def guarded(server: EmbeddedServer) -> EmbeddedServer:
    """A server with a password, and a user with the rights of the handshake's first commands only."""
    with Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", "geheim")
        admin.execute_command("ACL", "SETUSER", "guest", "on", ">word", "+ping", "+client")
    return server


@pytest.mark.parametrize(
    ("who", "reason"),
    [("", "(?i)authentication required"), (":wrong@", "(?i)invalid"), ("guest:word@", "(?i)permission")],
    ids=["no password", "a wrong password", "a user without rights"],
)
async def test_a_rejected_login_fails_at_once(guarded: EmbeddedServer, who: str, reason: str) -> None:
    url = guarded.url.replace("unix://", f"unix://{who}")
    started_at = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=reason):
        await RedisConnection(url).open()
    assert time.monotonic() - started_at < 4.5  # an attempt that is not rejected takes 5 s


async def test_the_password_of_the_url_is_used(guarded: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(guarded.url.replace("unix://", "unix://:geheim@"))
    assert await connection.send("ECHO", "x") == b"x"


async def test_a_server_of_another_protocol_is_an_unavailable_broker(tmp_path: Path) -> None:
    async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        writer.close()

    path = str(tmp_path / "web.sock")
    web = await asyncio.start_unix_server(chat, path)
    with pytest.raises(BrokerUnavailable):
        await RedisConnection(f"unix://{path}", patience_s=0.3).open()
    web.close()


async def test_closing_fails_unanswered_and_later_commands(redis_url: str) -> None:
    connection = await RedisConnection(redis_url).open()
    unanswered = connection.send("BLPOP", "nothing", 0, repeat=True)
    await asyncio.sleep(0)
    await connection.close()
    await connection.close()
    for asked in (unanswered, connection.send("PING", repeat=True, patient=True)):
        with pytest.raises(BrokerUnavailable, match="the connection was closed"):
            await asked


async def test_commands_posted_before_closing_are_sent(redis_url: str, connect: Connect) -> None:
    closing = await RedisConnection(redis_url).open()
    closing.send("SET", "penstock-test-last-words", "said", "PX", 1000).cancel()
    await closing.close()
    other = await connect(redis_url)
    assert await other.send("GET", "penstock-test-last-words") == b"said"


async def test_closing_while_the_server_is_away_ends_at_once(server: EmbeddedServer) -> None:
    connection = await RedisConnection(server.url).open()
    server.stop()
    await wait_until_async(lambda: not connection.connected)
    waiting = connection.send("PING", patient=True)
    started_at = time.monotonic()
    await connection.close()
    assert time.monotonic() - started_at < 4.5  # waiting commands would fail after 5 s
    with pytest.raises(BrokerUnavailable):
        await waiting


def test_a_connection_ends_with_its_loop(redis_url: str) -> None:
    """No "task was destroyed" and no unclosed transport: either would be an error in these tests."""

    async def forget() -> RedisConnection:
        connection = await RedisConnection(redis_url).open()
        assert await connection.send("PING") == b"PONG"
        return connection

    connection = asyncio.run(forget())
    assert not connection.connected
    del connection
    gc.collect()
    with Redis.from_url(redis_url) as redis:
        assert [client["name"] for client in redis.client_list() if client["name"] == "penstock"] == []
