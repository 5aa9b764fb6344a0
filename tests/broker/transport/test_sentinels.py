"""URLs of a service that sentinels watch, and connections that follow its primary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from penstock.broker.errors import BrokerUnavailable, ConfigError
from penstock.broker.queue.leases import Lease
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.transport.dial import user_of
from penstock.broker.transport.sentinels.url import parse_sentinel_url
from penstock.broker.transport.url import shown_url
from tests.broker.conftest import Connect
from tests.support.guarded import free_port, make_certificate, tls_relay
from tests.support.redis_servers import SERVICE, RedisServer, Watched, watched
from tests.support.waiting import wait_until, wait_until_async


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("sentinels")) as servers:
        yield servers


# -- the URL


def test_a_url_names_sentinels_service_and_both_logins() -> None:
    url = "redis+sentinel://me:p%40ss@a:1,b,[::1]:3/orders?db=2&sentinel_username=s&sentinel_password=w%2F&socket_timeout=1"
    service = parse_sentinel_url(url, shown_url(url))
    assert service.name == "orders"
    assert service.server_url == "redis://me:p%40ss@a:1/2?socket_timeout=1"
    assert service.sentinel_urls == ("redis://s:w%2F@a:1?", "redis://s:w%2F@b:26379?", "redis://s:w%2F@[::1]:3?")
    assert user_of(url) == "me"


def test_the_tls_options_are_those_of_primary_and_sentinels() -> None:
    url = "rediss+sentinel://:p@a:1/orders?ssl_ca_certs=%2Fca.pem&db=1"
    service = parse_sentinel_url(url, shown_url(url))
    assert service.server_url == "rediss://:p@a:1/1?ssl_ca_certs=%2Fca.pem"
    assert service.sentinel_urls == ("rediss://a:1?ssl_ca_certs=%2Fca.pem",)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis+sentinel://a:1", "must name one service"),
        ("redis+sentinel://a:1/", "must name one service"),
        ("redis+sentinel://a:1/orders/2", "must name one service"),
        ("redis+sentinel:///orders", "host:port of each sentinel"),
        ("redis+sentinel://a:1,,b:2/orders", "host:port of each sentinel"),
        ("redis+sentinel://a:port/orders", "host:port of each sentinel"),
        ("redis+sentinel://a:70000/orders", "host:port of each sentinel"),
        ("redis+sentinel://::1/orders", "host:port of each sentinel"),
        ("redis+sentinel://a:1/orders?db=x", "the database 'x' must be a number"),
        ("redis+sentinel://a:1/orders?color=red", "unknown"),
        ("redis+sentinel://a:1/orders?ssl_ca_certs=x", "unknown"),
        ("redis+cluster://a:1/orders", r"redis\+sentinel://"),
    ],
)
def test_a_malformed_url_is_refused_by_name(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RedisConnection(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://user:geheim@127.0.0.1:1/orders",
        "redis+sentinel://127.0.0.1:1/orders?sentinel_username=user&sentinel_password=geheim",
        "redis+sentinel://user:geheim@127.0.0.1:port/orders",
        "redis+sentinel://user:geheim@127.0.0.1:1",
        "redis+sentinel://user:a/geheim@127.0.0.1:1/orders",
        "redis+sentinel://:geheim@127.0.0.1:1,127.0.0.1:2/orders?db=geheim",
    ],
)
async def test_a_password_is_never_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ConfigError, BrokerUnavailable)) as caught:
        await RedisConnection(url, patience_s=0.1).open()
    shown = f"{caught.value!r} {caught.value} {shown_url(url)} {caplog.text}".replace("the database 'geheim'", "")
    assert "geheim" not in shown


# -- the primary


async def test_a_connection_is_to_the_primary(service: Watched, connect: Connect) -> None:
    connection = await connect(service.url)
    assert (await connection.send("ROLE"))[0] == b"master"
    assert str(service.primary.port).encode() in await connection.send("INFO", "server")


async def test_a_service_that_no_sentinel_knows_is_an_unavailable_broker(service: Watched) -> None:
    with pytest.raises(BrokerUnavailable, match=r"no sentinel names a primary of 'nothing' .*knows no service"):
        await RedisConnection(service.url.replace(SERVICE, "nothing"), patience_s=2.0).open()


async def test_sentinels_that_are_away_are_passed_over(service: Watched, connect: Connect) -> None:
    url = service.url.replace("sentinel://", f"sentinel://127.0.0.1:{free_port()},", 1)
    connection = await connect(url)
    assert (await connection.send("ROLE"))[0] == b"master"


async def test_a_server_that_is_not_the_primary_is_not_used(tmp_path: Path) -> None:
    """As where a sentinel has not learned yet that another server was elected."""
    with ExitStack() as running:
        replica = RedisServer(tmp_path, "--save", "", "--replicaof", "127.0.0.1 1")
        running.callback(replica.kill)
        sentinel = RedisServer(tmp_path, sentinel=True)
        running.callback(sentinel.kill)
        wait_until(lambda: replica.answers() and sentinel.answers(), timeout_s=10)
        with sentinel.client() as redis:
            redis.execute_command("SENTINEL", "MONITOR", SERVICE, "127.0.0.1", replica.port, 1)
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/{SERVICE}"
        with pytest.raises(BrokerUnavailable, match=r"READONLY|read only"):
            await RedisConnection(url, patience_s=2.0).open()
        with replica.client() as redis:
            redis.execute_command("REPLICAOF", "NO", "ONE")
        connection = await RedisConnection(url).open()
        assert (await connection.send("ROLE"))[0] == b"master"
        await connection.close()


async def test_connections_and_leases_follow_an_election_while_the_old_primary_is_well(
    service: Watched, connect: Connect
) -> None:
    """The old primary accepts writes for some seconds more: its connections must not stay with it."""
    key = "penstock-test-lease"
    connection = await connect(service.url)
    lease = Lease(service.url, key)
    lease.start()
    service.fail_over()
    port = str(service.primary.port).encode()

    async def is_there() -> bool:
        return connection.connected and port in await connection.send("INFO", "server", repeat=True)

    await wait_until_async(is_there)
    assert await connection.send("SET", "penstock-test-moved", "1", "PX", 10_000) == b"OK"
    with service.primary.client() as redis:
        assert redis.get("penstock-test-moved") == b"1"
        wait_until(lambda: "penstock-lease" in service.primary.clients())
        wait_until(lambda: redis.exists(key))
        lease.stop()
        assert not redis.exists(key)


# -- credentials and TLS


async def test_primary_and_sentinels_have_logins_of_their_own_and_tls(tmp_path: Path, connect: Connect) -> None:
    certificate, key = make_certificate(tmp_path)
    with ExitStack() as running:
        primary = RedisServer(tmp_path, "--save", "", "--requirepass", "geheim")
        running.callback(primary.kill)
        sentinel = RedisServer(tmp_path, "--requirepass", "watch", sentinel=True)
        running.callback(sentinel.kill)
        wait_until(lambda: primary.answers(password="geheim") and sentinel.answers(password="watch"), timeout_s=10)
        ports = free_port(), free_port()
        for port, server in zip(ports, (primary, sentinel), strict=True):
            running.enter_context(tls_relay(port, server.port, certificate, key))
        with sentinel.client(password="watch") as redis:
            redis.execute_command("SENTINEL", "MONITOR", SERVICE, "127.0.0.1", ports[0], 1)
        options = f"ssl_ca_certs={quote(str(certificate))}&ssl_check_hostname=false"
        url = f"rediss+sentinel://:geheim@localhost:{ports[1]}/{SERVICE}?{options}"
        connection = await connect(f"{url}&sentinel_password=watch")
        assert await connection.send("ECHO", "x") == b"x"
        lease = Lease(f"{url}&sentinel_password=watch", "penstock-test-lease")
        lease.start()
        assert await connection.send("EXISTS", "penstock-test-lease") == 1
        lease.stop()
        with pytest.raises(BrokerUnavailable, match=r"(?i)no sentinel names .*auth"):
            await RedisConnection(url, patience_s=3.0).open()
