"""One HTTP server on every node, on a cluster of several: nodes join, die and are cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from httpx import Client as HTTPClient, ConnectError

from penstock import serve
from penstock.broker.registry.reports import ProxyReport, ReplicaReport
from tests.serve.backends import SMALL
from tests.serve.load import load
from tests.serve.nodes.cluster import Cluster, Node, cluster
from tests.support.waiting import wait_until

PORT = 8000
PER_NODE = 2


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    with cluster() as machines:
        yield machines


@pytest.fixture(scope="module")
def second(machines: Cluster) -> Node:
    return machines.add_node()


@pytest.fixture(scope="module")
def client(machines: Cluster, second: Node) -> Iterator[serve.Client]:
    options: dict[str, Any] = {"location": "EveryNode", "host": "0.0.0.0", "port": PORT, "proxies_per_node": PER_NODE}
    with machines.instance(**options) as client:
        client.create_backend("f", telling_the_node(), config={"num_replicas": 2}, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
        yield client


@pytest.fixture(scope="module")
def http() -> Iterator[HTTPClient]:
    with HTTPClient(timeout=30) as http:
        yield http


def telling_the_node() -> Callable[[serve.Request], Awaitable[str]]:
    # Defined in a function so that it is pickled by value: the nodes cannot import the tests.
    async def answer(request: serve.Request) -> str:
        import ray

        await asyncio.sleep(0.05)
        return str(ray.get_runtime_context().get_node_id())

    return answer


def url(node: Node, path: str = "/e") -> str:
    return f"http://{node.address}:{PORT}{path}"


def proxies(machines: Cluster, node: Node) -> set[int]:
    """Return the process ids of a node's ready proxies."""
    there = url(node, "")
    return {proxy.pid for proxy in machines.reports(ProxyReport).values() if proxy.url == there}


def get(machines: Cluster, http: HTTPClient, node: Node, path: str = "/e") -> str:
    answer = machines.call(http.get, url(node, path))
    assert answer.status_code == 200, answer.text
    return answer.text


def seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    started_s = time.monotonic()
    function(*args, **kwargs)
    return time.monotonic() - started_s


def node_id(machines: Cluster, node: Node) -> str:
    """Its name in Ray."""
    there = url(node, "")
    return next(proxy.node for proxy in machines.reports(ProxyReport).values() if proxy.url == there)


def ready_replicas(machines: Cluster) -> list[str]:
    """Return the nodes of the ready replicas."""
    replicas = machines.reports(ReplicaReport).values()
    return [replica.node for replica in replicas if replica.state == "ready"]


def changes_go_on(machines: Cluster, client: serve.Client, http: HTTPClient, node: Node) -> None:
    """Make some, and see them at ``node``; long before Ray knows what the proxies' leases have told."""
    name = f"e{len(client.list_endpoints())}"
    assert seconds(client.create_endpoint, name, backend="f", route=f"/{name}") < 8
    assert get(machines, http, node, f"/{name}")
    assert seconds(client.delete_endpoint, name) < 8


def test_every_node_has_its_proxies(machines: Cluster, client: serve.Client, second: Node, http: HTTPClient) -> None:
    assert client.http_url == url(machines.head, "")
    for node in (machines.head, second):
        assert len(proxies(machines, node)) == PER_NODE
        assert get(machines, http, node)
    assert len(machines.reports(ProxyReport)) == 2 * PER_NODE


def test_replicas_are_spread_over_the_nodes(machines: Cluster, client: serve.Client, second: Node) -> None:
    places = ready_replicas(machines)
    assert sorted(places.count(place) for place in set(places)) == [1, 1]


def test_a_proxy_that_is_killed_is_restarted_soon(
    machines: Cluster, client: serve.Client, second: Node, http: HTTPClient
) -> None:
    before = proxies(machines, second)
    with load(lambda: get(machines, http, machines.head)):
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(proxies(machines, second) - {killed}) == PER_NODE, timeout_s=20)
    assert before - proxies(machines, second) == {killed}
    assert get(machines, http, second)


def test_a_node_that_joins_serves_and_one_that_dies_fails_no_request(
    machines: Cluster, client: serve.Client, second: Node, http: HTTPClient
) -> None:
    third = machines.add_node()
    wait_until(lambda: len(proxies(machines, third)) == PER_NODE)
    assert get(machines, http, third)
    there = node_id(machines, third)
    client.update_backend_config("f", {"num_replicas": 2 + 3})  # Ray spreads new actors, regardless of the running ones
    handle = client.get_handle("e")
    with (
        load(lambda: get(machines, http, second)) as over_http,
        load(lambda: handle.remote().result(timeout=30)) as by_handle,
    ):
        wait_until(lambda: there in by_handle.since(0))
        third.kill()
        changes_go_on(machines, client, http, second)
        over_http.goes_on()
        by_handle.goes_on()
        wait_until(lambda: len(machines.reports(ProxyReport)) == 2 * PER_NODE)
        wait_until(lambda: len(ready_replicas(machines)) == 2 + 3)
    assert not proxies(machines, third)
    with pytest.raises(ConnectError):
        get(machines, http, third)


def test_a_node_that_is_cut_off_delays_no_request(
    machines: Cluster, client: serve.Client, second: Node, http: HTTPClient
) -> None:
    """Its connections stay open and silent."""
    handle = client.get_handle("e")
    with (
        load(lambda: get(machines, http, machines.head)) as over_http,
        load(lambda: handle.remote().result(timeout=30)) as by_handle,
    ):
        second.unplug()
        changes_go_on(machines, client, http, machines.head)
        over_http.goes_on()
        by_handle.goes_on()
    # Also before Ray notices, which takes much longer.
    assert seconds(client.shutdown) < 20
