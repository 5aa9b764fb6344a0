"""Nodes that leave a cluster under load: what they hold is answered, and their work moves to other nodes."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import serve
from penstock.broker.registry.reports import ProxyReport, ReplicaReport
from tests.serve.backends import SMALL
from tests.serve.load import load
from tests.serve.nodes.cluster import Cluster, Node, cluster
from tests.support.waiting import wait_until

PORT = 8000
THREADS = 20
"""Of a load, which waits for twenty answers again and again, each of which takes a second."""
OPTIONS: dict[str, Any] = {"location": "EveryNode", "host": "0.0.0.0", "port": PORT, "drain_delay_s": 3.0}


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    with cluster() as machines:
        yield machines


@pytest.fixture(scope="module")
def client(machines: Cluster) -> Iterator[serve.Client]:
    with machines.instance(**OPTIONS) as client:
        client.create_backend("f", taking_a_second(), config={"num_replicas": 2}, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
        yield client


def taking_a_second() -> Callable[[serve.Request], Awaitable[str]]:
    # Defined in a function so that it is pickled by value: the nodes cannot import the tests.
    async def answer(request: serve.Request) -> str:
        await asyncio.sleep(1.0)
        return "well"

    return answer


class Balancer:
    """Sends each request to one of the proxies that were ready at its last check, like any load balancer."""

    def __init__(self, machines: Cluster, http: httpx.Client, nodes: list[Node]) -> None:
        self._machines, self._http = machines, http
        self._urls = [f"http://{node.address}:{PORT}" for node in nodes]
        self._turns = itertools.count()
        self.ready = [url for url in self._urls if self._is_ready(url)]

    def check(self) -> None:
        self.ready = [url for url in self._urls if self._is_ready(url)]

    def get(self) -> str:
        ready = self.ready
        answer = self._machines.call(self._http.get, ready[next(self._turns) % len(ready)] + "/e")
        assert answer.status_code == 200, answer.text
        return answer.text

    def _is_ready(self, url: str) -> bool:
        try:
            return self._machines.call(self._http.get, f"{url}/-/readyz").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def balancer(machines: Cluster, nodes: list[Node]) -> Generator[Balancer]:
    with httpx.Client(timeout=60) as http:
        one, ended = Balancer(machines, http, nodes), threading.Event()

        def check() -> None:
            while not ended.wait(0.1):
                one.check()

        checking = threading.Thread(target=check)
        checking.start()
        try:
            yield one
        finally:
            ended.set()
            checking.join()


def replica_nodes(machines: Cluster) -> list[str]:
    """Return the node of each ready replica."""
    return [report.node for report in machines.reports(ReplicaReport).values() if report.state == "ready"]


def is_in_use(machines: Cluster, node_id: str) -> bool:
    proxies = machines.reports(ProxyReport).values()
    return node_id in replica_nodes(machines) or any(proxy.node == node_id for proxy in proxies)


def wait_for_proxy(machines: Cluster, node: Node) -> str:
    """Return Ray's id of a node, once it has a proxy that is ready."""
    url = f"http://{node.address}:{PORT}"

    def there() -> list[str]:
        return [report.node for report in machines.reports(ProxyReport).values() if report.url == url]

    wait_until(there, timeout_s=120)  # a node, a worker of Ray and a proxy start meanwhile
    return there()[0]


def spread_to(machines: Cluster, client: serve.Client, node_id: str) -> None:
    """Scale until a replica runs on a node: Ray spreads new actors, regardless of the running ones."""
    for number in itertools.count(3):
        if node_id in replica_nodes(machines):
            return
        client.update_backend_config("f", {"num_replicas": number})


@contextmanager
def penstock_node(machines: Cluster, *arguments: str) -> Generator[tuple[Node, subprocess.Popen[str]]]:
    node = machines.plug_in()
    with node.penstock_node(*arguments) as running:
        try:
            yield node, running
        finally:
            running.kill()
            node.kill()


def test_a_node_that_is_stopped_loses_no_request(machines: Cluster, client: serve.Client) -> None:
    with penstock_node(machines) as (node, running):
        node_id = wait_for_proxy(machines, node)
        spread_to(machines, client, node_id)
        count, handle = len(replica_nodes(machines)), client.get_handle("e")
        with (
            balancer(machines, [machines.head, node]) as web,
            load(web.get, threads=THREADS) as over_http,
            load(lambda: handle.remote().result(timeout=60), threads=THREADS) as by_handle,
        ):
            running.send_signal(signal.SIGTERM)
            _, log = running.communicate(timeout=60)
            assert (running.returncode, log.splitlines()[-1]) == (0, "penstock node: the node has ended: drained"), log
            over_http.goes_on()
            by_handle.goes_on()
            wait_until(lambda: len(replica_nodes(machines)) == count)
        assert not node.namespace.pids("ray")
        assert not is_in_use(machines, node_id)
        # Nothing ran twice, as it would if a replica had been killed.
        sent = over_http.sent + by_handle.sent
        wait_until(lambda: client.status()["backends"]["f"]["served"] == sent)
        backend = client.status()["backends"]["f"]
        assert backend["failed"] == backend["dead_letters"] == 0


def test_a_node_that_ray_drains_loses_no_request(machines: Cluster, client: serve.Client) -> None:
    node = machines.add_node()
    node_id = wait_for_proxy(machines, node)
    spread_to(machines, client, node_id)
    before, handle = client.status()["backends"]["f"]["served"], client.get_handle("e")
    with (
        balancer(machines, [machines.head, node]) as web,
        load(web.get, threads=THREADS) as over_http,
        load(lambda: handle.remote().result(timeout=60), threads=THREADS) as by_handle,
    ):
        drained = machines.head.run(
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--node-id={node_id}"),
            *(
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=maintenance",
                "--deadline-remaining-seconds=60",
            ),
        )
        assert drained.wait(60) == 0
        wait_until(lambda: not is_in_use(machines, node_id))
        # Ray ends a node that drains once nothing runs on it.
        wait_until(lambda: not node.namespace.pids("raylet"))
        over_http.goes_on()
        by_handle.goes_on()
    wait_until(lambda: client.status()["backends"]["f"]["served"] == before + over_http.sent + by_handle.sent)
    assert client.status()["backends"]["f"]["failed"] == 0


def test_a_second_signal_ends_a_node_at_once(machines: Cluster, client: serve.Client, tmp_path: Path) -> None:
    joined = tmp_path / "joined"
    arguments = ("--drain-timeout", "600", "--on-ready", f'printf "$RAY_ADDRESS" > {joined}')
    with penstock_node(machines, *arguments) as (node, running):
        wait_for_proxy(machines, node)
        assert joined.read_text().startswith(f"{machines.head.address}:")
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        while "drains for at most 600 s" not in running.stderr.readline():
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
        assert (running.returncode, log.splitlines()[-1]) == (143, "penstock node: the node has ended: cut short"), log
        assert not node.namespace.pids("ray")


def answering_at_once() -> Callable[[serve.Request], Awaitable[str]]:
    async def answer(request: serve.Request) -> str:
        return "well"

    return answer


def test_the_one_proxy_moves_to_the_head_when_its_node_dies_and_back_when_that_returns(machines: Cluster) -> None:
    node, port = machines.add_node(), PORT + 100
    there, at_head = (f"http://{address}:{port}" for address in (node.address, machines.head.address))
    options: dict[str, Any] = {"host": "0.0.0.0", "port": port, "drain_delay_s": 0.1}
    with (
        machines.instance(on=node, detached=True, name="one", location="HeadOnly", **options) as client,
        httpx.Client(timeout=30) as http,
    ):
        client.create_backend("f", answering_at_once(), config={"num_replicas": 2}, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")

        def answers(url: str) -> bool:
            try:
                return bool(machines.call(http.get, f"{url}/e").text == "well")
            except httpx.TransportError:
                return False

        def moved() -> list[str]:
            return [warning for warning in client.status()["warnings"] if warning.startswith("HTTP is ")]

        assert answers(there)
        assert not moved()
        (started_on,) = (proxy["node"] for proxy in client.status()["proxies"].values())
        node.kill()
        wait_until(lambda: answers(at_head), timeout_s=120)
        reason = f"node {started_on[:12]} ({node.address}), which started the instance, is gone"
        wait_until(lambda: moved() == [f"HTTP is served at {at_head}, because {reason}"])
        machines.join(node)
        wait_until(lambda: answers(there))
        wait_until(lambda: not moved())
