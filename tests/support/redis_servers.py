"""Redis servers with a port, of any mode: single ones, nodes of a cluster, a primary with replicas and sentinels."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from penstock.broker.embedded.server import _find_binary  # pyright: ignore[reportPrivateUsage]
from tests.support.guarded import free_port
from tests.support.waiting import wait_until

SERVICE = "orders"
"""The service that the sentinels of a test watch."""


class RedisServer:
    """A server process at one address of this machine, whose data is in memory alone."""

    def __init__(
        self,
        directory: Path,
        *settings: str,
        sentinel: bool = False,
        port: int | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.host = host
        self.port = free_port() if port is None else port
        self.directory = directory / str(self.port)
        self.directory.mkdir(exist_ok=True)
        settings = ("--port", str(self.port), "--bind", host, "--dir", str(self.directory), *settings)
        # It writes its state into its configuration file.
        config = self.directory / "server.conf"
        if not config.exists():
            config.write_text("")
        command = [str(_find_binary()), str(config), *settings, *(["--sentinel"] if sentinel else [])]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def client(self, **options: Any) -> Redis:
        """Return a client, which is to be closed."""
        return Redis(self.host, self.port, socket_timeout=5, protocol=2, **options)

    def answers(self, **options: Any) -> bool:
        try:
            with self.client(**options) as redis:
                return bool(redis.ping())
        except RedisError:
            return False

    def clients(self) -> list[str]:
        """Return the names of the connections of Penstock; none of a server that has ended."""
        try:
            with self.client() as redis:
                names = [client["name"] for client in redis.client_list()]
        except RedisError:
            return []
        return [name for name in names if name.startswith("penstock")]

    def kill(self) -> None:
        """End it without a farewell."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Let it keep its connections and answer nothing more; `kill` still ends it."""
        self._process.send_signal(signal.SIGSTOP)


@contextmanager
def cluster_node(directory: Path, *, has_slots: bool = True) -> Generator[RedisServer]:
    """A node of a cluster of one."""
    with ExitStack() as running:
        server = RedisServer(directory, "--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--save", "")
        running.callback(server.kill)
        wait_until(server.answers, timeout_s=10)
        if has_slots:
            with server.client() as redis:
                redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                wait_until(lambda: "cluster_state:ok" in str(_execute(redis, "CLUSTER", "INFO")))
        yield server


class Watched:
    """A primary, its replicas, and the sentinels that watch them."""

    def __init__(
        self,
        running: ExitStack,
        directory: Path,
        *,
        replicas: int = 1,
        sentinels: int = 3,
        settings: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        def start(*arguments: str, sentinel: bool = False) -> RedisServer:
            server = RedisServer(directory, *arguments, "--protected-mode", "no", sentinel=sentinel, host=host)
            running.callback(server.kill)
            return server

        common = ("--save", "", "--repl-diskless-sync-delay", "0", *settings)
        primary = start(*common)
        following = ("--replicaof", f"{host} {primary.port}")
        self.servers = [primary, *(start(*common, *following) for _ in range(replicas))]
        wait_until(lambda: all(server.answers() for server in self.servers), timeout_s=10)
        wait_until(lambda: self._replicas_of(primary) == replicas)
        self.sentinels = [start(sentinel=True) for _ in range(sentinels)]
        wait_until(lambda: all(sentinel.answers() for sentinel in self.sentinels), timeout_s=10)
        for sentinel in self.sentinels:
            with sentinel.client() as redis:
                redis.execute_command("SENTINEL", "MONITOR", SERVICE, host, primary.port, sentinels // 2 + 1)
                for option in (("down-after-milliseconds", 500), ("failover-timeout", 3000)):
                    redis.execute_command("SENTINEL", "SET", SERVICE, *option)
        wait_until(lambda: all(self._knows_all(sentinel) for sentinel in self.sentinels), timeout_s=30)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{sentinel.host}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    @property
    def primary(self) -> RedisServer:
        """The server that the first living sentinel names."""
        port = self._primary_port(next(sentinel for sentinel in self.sentinels if sentinel.answers()))
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> None:
        """Let the sentinels elect another primary, while the old one is well; return when they have."""
        old = self.primary.port
        with self.sentinels[0].client() as redis:
            redis.execute_command("SENTINEL", "FAILOVER", SERVICE)
        wait_until(lambda: self._primary_port(self.sentinels[0]) != old, timeout_s=30)

    def kill_primary(self) -> None:
        """Kill the primary, and return when the sentinels have elected another one."""
        old = self.primary
        old.kill()
        wait_until(lambda: self._primary_port(self.sentinels[0]) != old.port, timeout_s=30)

    def _knows_all(self, sentinel: RedisServer) -> bool:
        with sentinel.client() as redis:
            flat: list[bytes] = _execute(redis, "SENTINEL", "MASTER", SERVICE)
        state = dict(zip(flat[::2], flat[1::2], strict=True))
        others, replicas = (int(state[name]) for name in (b"num-other-sentinels", b"num-slaves"))
        return others == len(self.sentinels) - 1 and replicas == len(self.servers) - 1

    @staticmethod
    def _primary_port(sentinel: RedisServer) -> int:
        with sentinel.client() as redis:
            return int(_execute(redis, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    @staticmethod
    def _replicas_of(primary: RedisServer) -> int:
        with primary.client() as redis:
            return sum(1 for _, value in redis.info("replication").items() if _is_online(value))


def _execute(redis: Redis, *command: str) -> Any:
    client: Any = redis
    return client.execute_command(*command)


def _is_online(value: Any) -> bool:
    return isinstance(value, dict) and cast("dict[str, Any]", value).get("state") == "online"


@contextmanager
def watched(directory: Path, **options: Any) -> Generator[Watched]:
    """Start a primary with ``replicas`` and ``sentinels``, with further ``settings`` of the servers."""
    with ExitStack() as running:
        yield Watched(running, directory, **options)
