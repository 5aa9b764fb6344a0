"""A node of a Redis Cluster is refused by name wherever a URL is taken, at once."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import handles, serve
from penstock.broker.errors import ConfigError
from penstock.broker.queue.leases import Lease
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.transport.error_replies import error_of
from penstock.proxy.proxy import Proxy
from tests.serve.cli.command_line import command_line
from tests.support.redis_servers import RedisServer, cluster_node

FOUND = r"it is a node of a cluster \(\w+ \d+\.\d+\.\d+, mode cluster\)"
AT_ONCE_S = 4.5
"""Less than the 5 s that a connection waits for a broker that may come back. It takes a few milliseconds."""


@pytest.fixture(scope="module", params=[True, False], ids=["with slots", "without slots"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("cluster")
    with cluster_node(directory, has_slots=request.param) as server:
        yield f"redis://127.0.0.1:{server.port}"


async def test_a_connection_refuses_it(node: str) -> None:
    started_at = time.monotonic()
    with pytest.raises(ConfigError, match=FOUND):
        await RedisConnection(node).open()
    assert time.monotonic() - started_at < AT_ONCE_S


def test_start_refuses_it_before_ray_starts(node: str) -> None:
    started_at = time.monotonic()
    with pytest.raises(ConfigError, match=FOUND):
        serve.start(redis_url=node)
    assert time.monotonic() - started_at < AT_ONCE_S


def test_connecting_refuses_it(node: str) -> None:
    with pytest.raises(ConfigError, match=FOUND):
        serve.connect(node)
    with pytest.raises(ConfigError, match=FOUND), handles.connect(node) as connection:
        connection.get_handle("greet").remote("x").result(AT_ONCE_S)


def test_a_lease_refuses_it(node: str) -> None:
    lease = Lease(node, "penstock:default:{model}:alive:model#1")
    with pytest.raises(ConfigError, match=FOUND):
        lease.start()
    lease.stop()


async def test_a_proxy_refuses_it(node: str) -> None:
    proxy = Proxy(node, "default", "p", {"port": 0})
    with pytest.raises(ConfigError, match=FOUND):
        await asyncio.wait_for(proxy.ready(), AT_ONCE_S)
    await proxy.drain(0.0)


def test_the_command_refuses_it(node: str) -> None:
    ran = subprocess.run(
        command_line("status", "--redis-url", node), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0
    assert "it is a node of a cluster" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_error_that_only_a_cluster_has_is_explained() -> None:
    """As behind a proxy that does not pass the greeting on."""
    error = error_of("MOVED 866 10.0.0.7:6379", [b"PING"], "redis://broker")
    assert "it is a node of a cluster" in str(error)


async def test_a_sentinel_is_refused_with_the_url_to_use(tmp_path: Path) -> None:
    sentinel = RedisServer(tmp_path, sentinel=True)
    try:
        with pytest.raises(ConfigError, match=r"it is a sentinel .*redis\+sentinel://host:port/service"):
            await RedisConnection(f"redis://127.0.0.1:{sentinel.port}", patience_s=10).open()
    finally:
        sentinel.kill()
