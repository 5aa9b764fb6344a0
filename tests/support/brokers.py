"""The brokers that tests run against: the embedded one, and real ones in containers."""

import asyncio
import os
import subprocess
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, cast

import pytest
from redis import Redis
from redis.exceptions import RedisError
from testcontainers.core.container import DockerContainer

from penstock.broker.embedded.server import EmbeddedServer
from penstock.handles.calls.shared_client import open_clients
from tests.support.waiting import wait_until

KINDS = ("embedded", "redis-container", "valkey-container")

_IMAGES = {
    "redis": "redis:7.0",
    "valkey": "valkey/valkey:9",
    "haproxy": "haproxy:3.2",
    "python": "python:3.12-slim",
}


class Brokers:
    """Starts a broker of each kind when a test first asks for it; all of them end with the session."""

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._running = ExitStack()

    def __enter__(self) -> "Brokers":
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def url(self, kind: str) -> str:
        if kind not in self._urls:
            start = _embedded() if kind == "embedded" else _container(kind.removesuffix("-container"))
            self._urls[kind] = self._running.enter_context(start)
        return self._urls[kind]


@contextmanager
def clean(url: str) -> Generator[str]:
    """Give a broker to one test, and empty it.

    Raises:
        AssertionError: the test left keys that nothing would ever have removed, or calls in flight. A client of this
            process publishes such calls again once the broker is empty, into the queues of a later test.
    """
    yield url
    with suppress(AssertionError):  # the second look says more
        wait_until(lambda: not _in_flight(url), timeout_s=5)
    calls = _in_flight(url)
    with Redis.from_url(url) as redis:
        keys = cast("Iterable[bytes]", redis.scan_iter("penstock:*", count=1000))
        # Without an expiry and without an owner: that is how a broker fills up over the months.
        left = sorted(key.decode() for key in keys if redis.ttl(key) == -1)
        close_clients(url)
        redis.flushall()
    assert not left, f"keys without expiry outlived the test: {', '.join(left)}"
    assert not calls, f"calls outlived the test: {', '.join(calls)}"


def close_clients(url: str) -> None:
    """Close the clients that handles share, whose reply streams are emptied with the broker.

    They would find that out when they miss the replies to the requests of a later test, which would run again.
    """
    for client in open_clients(url, "default"):
        if client.loop.is_running():  # those of other loops have ended with them
            asyncio.run_coroutine_threadsafe(client.close(), client.loop).result(timeout=30)


def _in_flight(url: str) -> list[str]:
    """Return the calls in flight of the clients in this process that handles share."""
    return [call.shown_id for client in open_clients(url, "default") for call in list(client.in_flight.by_id.values())]


@contextmanager
def _embedded() -> Generator[str]:
    server = EmbeddedServer.start()
    try:
        yield server.url
    finally:
        server.stop()


@contextmanager
def _container(name: str) -> Generator[str]:
    if reason := no_docker():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must test against brokers in containers: {reason}")
        pytest.skip(reason)
    with DockerContainer(images()[name]).with_exposed_ports(6379) as container:
        url = f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}"
        wait_until(lambda: _answers(url), timeout_s=30)
        yield url


def images() -> dict[str, str]:
    """Return the image of each server, and that of Python, by name; empty if there is none."""
    named = os.environ.get("PENSTOCK_TEST_IMAGES", "")
    return _IMAGES | dict(pair.split("=", 1) for pair in named.split(",") if pair)


@cache
def no_docker() -> str | None:
    """Return why there is no Docker engine to use, if there is none."""
    try:
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return f"no Docker engine answers: {error}"
    return None if asked.returncode == 0 else f"no Docker engine answers: {asked.stderr.strip()}"


def _answers(url: str) -> bool:
    options: dict[str, Any] = {"socket_timeout": 1, "socket_connect_timeout": 1}
    try:
        with Redis.from_url(url, **options) as redis:
            return bool(redis.ping())
    except RedisError:
        return False


def wait_until_written(url: str) -> None:
    """Return when a durable server has in its file all that it was told, which it may put off for two seconds."""
    with Redis.from_url(url) as redis:
        wait_until(lambda: redis.info("persistence")["aof_buffer_length"] == 0)
