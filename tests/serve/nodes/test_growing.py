"""A cluster that Ray's autoscaler enlarges: replicas wait for nodes, and nodes without replicas are given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock import serve
from penstock.serve.rollout_wait import NODES_WAIT_S
from tests.serve.nodes.cluster import Cluster, cluster
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    with cluster(grows=True) as machines:
        yield machines


@pytest.fixture(scope="module")
def client(machines: Cluster) -> Iterator[serve.Client]:
    with machines.instance(location="NoServer") as client:
        yield client


def answering() -> Callable[[serve.Request], str]:
    # Defined in a function so that it is pickled by value: the nodes cannot import the tests.
    def answer(request: serve.Request) -> str:
        return "well"

    return answer


def nodes(machines: Cluster) -> int:
    return len(machines.head.namespace.pids("raylet/raylet"))


def test_a_backend_that_does_not_fit_waits_until_a_node_was_added(machines: Cluster, client: serve.Client) -> None:
    with ThreadPoolExecutor() as threads:
        creating = threads.submit(client.create_backend, "f", answering(), ray_actor_options={"num_cpus": 2})
        wait_until(lambda: bool(client.status()["backends"].get("f", {}).get("waits_for_nodes")))
        status = client.status()
        missing = "1 replica with CPU 2 each requested, room for 0: "
        assert status["backends"]["f"]["waits_for_nodes"].startswith(missing)
        assert f"f waits for nodes: {missing}" in str(status)
        assert status["backends"]["f"]["lacking"] is None
        creating.result(timeout=60)
    assert nodes(machines) == 2
    assert client.status()["backends"]["f"]["waits_for_nodes"] is None
    client.create_endpoint("e", backend="f")
    assert client.get_handle("e").remote().result(timeout=10) == "well"


def test_what_no_node_can_have_is_refused_soon(client: serve.Client) -> None:
    began_s = time.monotonic()
    with pytest.raises(serve.errors.ConfigError, match="1 replica with CPU 1, GPU 1 each requested, room for 0: "):
        client.create_backend("g", answering(), ray_actor_options={"num_gpus": 1})
    assert time.monotonic() - began_s < NODES_WAIT_S / 4
    assert "g" not in client.list_backends()


def test_a_node_without_replicas_is_given_back(machines: Cluster, client: serve.Client) -> None:
    client.update_backend_config("f", {"num_replicas": 3})
    assert nodes(machines) == 3
    client.update_backend_config("f", {"num_replicas": 1})
    wait_until(lambda: nodes(machines) == 2)
    client.delete_endpoint("e")
    client.delete_backend("f")
    wait_until(lambda: nodes(machines) == 1)
