"""Ray's head is killed, and the controller too: what serves goes on, and is adopted when they return.

Ray keeps its own state in a Redis here (``RAY_REDIS_ADDRESS``), as `docs/operations.md` has operators do.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise

import pytest
from httpx import Client as HTTPClient

from penstock import serve
from penstock.broker.registry.reports import ProxyReport, ReplicaReport
from tests.serve.backends import SMALL
from tests.serve.load import Load, load
from tests.serve.nodes.cluster import Cluster, Node, cluster
from tests.support.waiting import wait_until

PORT = 8000


@pytest.fixture
def machines() -> Iterator[Cluster]:
    with cluster(keep_ray_state=True) as machines:
        yield machines


def taking_its_time() -> Callable[[serve.Request], Awaitable[str]]:
    # Defined in a function so that it is pickled by value: the nodes cannot import the tests.
    async def answer(request: serve.Request) -> str:
        await asyncio.sleep(0.05)
        return "well"

    return answer


def serving(machines: Cluster) -> dict[str, int]:
    """Return the process id of each replica and proxy that is ready."""
    replicas, proxies = machines.reports(ReplicaReport), machines.reports(ProxyReport)
    reports: list[tuple[str, ReplicaReport | ProxyReport]] = [*replicas.items(), *proxies.items()]
    return {name: report.pid for name, report in reports if report.state == "ready"}


def rates(calls: list[Load]) -> list[list[int]]:
    """Return the number of calls of each kind that are answered in each of three seconds."""
    began_s = [time.monotonic()]
    while len(began_s) <= 3:
        time.sleep(1.0)
        began_s.append(time.monotonic())
    return [
        [sum(began <= at_s < end for at_s, _ in load.answers) for began, end in pairwise(began_s)] for load in calls
    ]


def controller_of(machines: Cluster, node: Node) -> set[int]:
    """The controller's process, and Ray's idle ones: it may be called as these are."""
    workers = set(node.namespace.pids("ray::")) - set(node.namespace.pids("Agent"))
    return workers - set(serving(machines).values())


def test_serving_goes_on_without_ray_and_is_adopted_when_it_returns(machines: Cluster) -> None:
    node = machines.add_node()
    url = f"http://{node.address}:{PORT}"
    with machines.instance(on=node, detached=True, host="0.0.0.0", port=PORT) as client, HTTPClient(timeout=30) as http:

        def get(path: str) -> str:
            return machines.call(http.get, url + path).raise_for_status().text

        client.create_backend("f", taking_its_time(), config={"num_replicas": 2}, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
        handle = client.get_handle("e")
        before = serving(machines)
        assert len(before) == 3
        with load(lambda: get("/e")) as web, load(lambda: handle.remote().result(timeout=30)) as direct:
            with_ray, controller = rates([web, direct]), controller_of(machines, node)
            assert controller

            machines.head.kill()
            wait_until(lambda: client.status()["controller"] == "waiting for Ray's head")
            for pid in controller:
                os.kill(pid, signal.SIGKILL)
            without_ray = rates([web, direct])
            # Changes that neither start nor end a process still work.
            client.create_endpoint("other", backend="f", route="/other")
            assert get("/other") == "well"
            wait_until(lambda: client.status()["controller"] == "away")

            machines.start_head()
            wait_until(lambda: client.status()["controller"] == "alive", timeout_s=30)
            client.update_backend_config("f", {"num_replicas": 3})
            assert serving(machines).items() > before.items()
            assert len(serving(machines)) == 4
            os.kill(next(pid for name, pid in before.items() if name.startswith("f#")), signal.SIGKILL)
            wait_until(lambda: len(serving(machines)) == 4 and not serving(machines).items() >= before.items())
        print(f"calls in each second over HTTP and by handles: {with_ray} with Ray's head, {without_ray} without")
        for before_it, without in zip(with_ray, without_ray, strict=True):
            assert max(without) > 0.6 * min(before_it)
