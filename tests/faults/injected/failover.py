"""A primary, its replica, and an address that leads to the primary: a failover leaves old connections open."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from tests.faults.injected.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

_NOWHERE = ("127.0.0.1", 1)


class Pair:
    """Two servers. ``url`` is the address of the primary."""

    def __init__(self, servers: list[EmbeddedServer], ways: list[TcpProxy], address: TcpProxy) -> None:
        self._servers, self._ways, self._address = servers, ways, address
        self._primary = 0
        self.url = address.url
        self.promoted_at = 0.0

    @property
    def visits(self) -> int:
        """How many connections to the address there have been."""
        return self._address.visits

    @property
    def primary(self) -> EmbeddedServer:
        return self._servers[self._primary]

    def demote(self) -> None:
        """Make the primary a replica of nothing. Its connections stay open, and the address leads to it still."""
        with Redis.from_url(self._servers[self._primary].url) as redis:
            redis.replicaof(*_NOWHERE)

    def promote(self) -> None:
        """Make the other one the primary, to which the address leads from now on."""
        old, self._primary = self._primary, 1 - self._primary
        with Redis.from_url(self._servers[self._primary].url) as redis:
            redis.replicaof("NO", "ONE")
        self._address.lead_to(self._servers[self._primary].url)
        self.promoted_at = time.monotonic()
        with Redis.from_url(self._servers[old].url) as redis:
            self._follow(redis, self._ways[self._primary])

    def clients_of_the_replica(self) -> list[str]:
        """Return the names of Penstock's connections that are still at the demoted server."""
        with Redis.from_url(self._servers[1 - self._primary].url) as redis:
            clients: list[dict[str, Any]] = redis.client_list()
            return sorted(client["name"] for client in clients if client["name"].startswith("penstock"))

    def start_replicating(self) -> None:
        with Redis.from_url(self._servers[1 - self._primary].url) as replica:
            self._follow(replica, self._ways[self._primary])

    def stop_replicating(self) -> None:
        with Redis.from_url(self._servers[1 - self._primary].url) as replica:
            replica.replicaof("NO", "ONE")

    def _follow(self, replica: Redis, way: TcpProxy) -> None:
        replica.replicaof("127.0.0.1", int(way.url.rpartition(":")[2]))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up")


@contextmanager
def pair() -> Generator[Pair]:
    with ExitStack() as running:
        servers = [running.enter_context(EmbeddedServer.start()) for _ in range(2)]
        # An embedded server has no port, which replication needs.
        ways = [running.enter_context(TcpProxy(server.url)) for server in servers]
        pair = Pair(servers, ways, running.enter_context(TcpProxy(servers[0].url)))
        pair.start_replicating()
        yield pair
        pair.stop_replicating()
