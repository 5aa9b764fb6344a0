"""``compose.yaml`` under load: containers are killed, stopped, started and scaled, and no request is lost.

Each client repeats what was refused (503), and the balancer what broke off: every request has an ``Idempotency-Key``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from penstock import serve
from tests.containers.project import Project, docker, inspect, logs
from tests.containers.traffic import Outcomes, traffic
from tests.faults.load.table import TABLE
from tests.support.redis_servers import watched
from tests.support.waiting import wait_until

# The first test waits for the image, which takes a minute to build, and several minutes on a busy machine.
pytestmark = pytest.mark.timeout(600)

IS_LONG = os.environ.get("PENSTOCK_TEST_FAULTS") == "full"
"""As by ``make faults``."""
RATE = 20.0 if IS_LONG else 10.0
HEAD_AWAY_S = 30.0 if IS_LONG else 0.0
GOES_ON = 400 if IS_LONG else 15
"""The number of answers before and after each fault."""

IMAGE = [0.0] * 64
RECOVERED_S = 240.0


class Cluster:
    """The project's cluster as its clients see it."""

    def __init__(self, project: Project, client: serve.Client) -> None:
        self._project, self._client = project, client
        self.url = f"http://{project.address('lb', 8000)}"

    def has_workers(self, workers: int) -> None:
        """Start or stop workers until there are so many."""
        if len(self._project.workers()) != workers:
            self._project.up(workers=workers)
            self.wait_until_whole()

    def is_whole(self) -> bool:
        return is_whole(self._client)

    def wait_until_whole(self) -> None:
        for container in [self._project.container("head"), *self._project.workers()]:
            self._project.wait_until_healthy(container)
        wait_until(self.is_whole, timeout_s=RECOVERED_S)

    @contextmanager
    def load(self, scenario: str, path: str = "/digit", body: object = IMAGE) -> Generator[Outcomes]:
        with load(scenario, self.url + path, body) as seen:
            yield seen


@contextmanager
def load(scenario: str, url: str, body: object) -> Generator[Outcomes]:
    """Send requests meanwhile; afterwards none may be lost. Adds a row to the table."""
    began_s = time.monotonic()
    with traffic(url, body, RATE) as seen:
        goes_on(seen)
        yield seen
        goes_on(seen)
    TABLE.add(seen.row(scenario, time.monotonic() - began_s))
    assert seen.lost == []
    assert seen.answered == seen.sent


def goes_on(seen: Outcomes) -> None:
    """Wait for some more answers."""
    enough = seen.answered + GOES_ON
    wait_until(lambda: seen.answered >= enough or seen.lost, timeout_s=RECOVERED_S)


def is_whole(client: serve.Client) -> bool:
    """Return whether the controller is there, and every replica of every backend is ready."""
    status = client.status()
    ready = (backend["ready"] == 2 for backend in status["backends"].values())
    return status["controller"] == "alive" and all(ready)


@contextmanager
def slow_backend(client: serve.Client) -> Generator[None]:
    """The code of slow.py behind an endpoint, in two replicas."""
    client.create_backend("slow", "slow:answer", config={"num_replicas": 2}, ray_actor_options={"num_cpus": 0.1})
    client.create_endpoint("slow", backend="slow", route="/slow", methods=["POST"])
    yield
    client.delete_endpoint("slow")
    client.delete_backend("slow")


@pytest.fixture
def cluster_of_containers(project: Project, client: serve.Client) -> Cluster:
    return Cluster(project, client)


def test_the_command_of_the_readme_serves_the_example(
    project: Project, cluster_of_containers: Cluster, client: serve.Client
) -> None:
    answer = httpx.post(f"{cluster_of_containers.url}/digit", json=IMAGE)
    assert answer.status_code == 200, answer.text
    assert 0 <= answer.json()["digit"] <= 9
    assert client.status()["warnings"] == []


def test_deploying_again_restores_what_is_missing(
    project: Project, cluster_of_containers: Cluster, client: serve.Client
) -> None:
    client.delete_endpoint("digit")
    url = f"{cluster_of_containers.url}/digit"
    wait_until(lambda: httpx.post(url, json=IMAGE).status_code == 404)
    project.compose("run", "--rm", "deploy")
    wait_until(lambda: httpx.post(url, json=IMAGE).status_code == 200)


def test_no_container_may_write_to_its_image_or_runs_as_root(project: Project, cluster_of_containers: Cluster) -> None:
    for service in ("redis", "ray-state", "head", "worker", "lb"):
        state = inspect(project.container(service))
        assert state["HostConfig"]["ReadonlyRootfs"], service
        assert state["HostConfig"]["CapDrop"] == ["ALL"], service
        assert state["Config"]["User"] not in ("", "0", "root"), service


def test_two_workers_join_under_load(project: Project, cluster_of_containers: Cluster) -> None:
    with cluster_of_containers.load("scale from 1 to 3"):
        project.up(workers=3)
    assert len(project.workers()) == 3


def test_a_killed_worker_loses_nothing_and_rejoins(project: Project, cluster_of_containers: Cluster) -> None:
    cluster_of_containers.has_workers(3)
    with cluster_of_containers.load("worker killed"):
        docker("kill", worker := project.workers()[0])
    with cluster_of_containers.load("node rejoins"):
        docker("start", worker)
        cluster_of_containers.wait_until_whole()


def test_a_killed_head_is_not_missed_until_it_is_back(project: Project, cluster_of_containers: Cluster) -> None:
    head = project.container("head")
    with cluster_of_containers.load(f"head killed, away {HEAD_AWAY_S:.0f} s" if IS_LONG else "head killed") as seen:
        docker("kill", head)
        gone_s = time.monotonic()
        wait_until(lambda: time.monotonic() >= gone_s + HEAD_AWAY_S, timeout_s=2 * RECOVERED_S)
        goes_on(seen)
        docker("start", head)
        cluster_of_containers.wait_until_whole()


def test_a_killed_redis_loses_nothing_that_was_accepted(project: Project, cluster_of_containers: Cluster) -> None:
    redis = project.container("redis")
    with cluster_of_containers.load("Redis killed"):
        docker("kill", redis)
        docker("start", redis)
        project.wait_until_healthy(redis)
        wait_until(cluster_of_containers.is_whole, timeout_s=RECOVERED_S)


def test_an_election_by_sentinels_loses_nothing(
    project: Project, cluster_of_containers: Cluster, tmp_path: Path
) -> None:
    """Of an instance of its own on the same nodes. Its servers are processes of this machine."""
    with watched(tmp_path, host=project.gateway()) as servers:
        head, common = project.container("head"), ("--redis-url", servers.url, "--instance", "watched")
        docker("exec", head, "penstock", "start", *common, "--http-host", "0.0.0.0", "--http-port", "8001")
        with serve.connect(servers.url, "watched") as client:
            docker("exec", head, "penstock", "deploy", *common, "/app/examples/compose/digits.yaml")
            wait_until(lambda: is_whole(client), timeout_s=RECOVERED_S)
            with load("Sentinel: primary killed", f"http://{project.ip(head)}:8001/digit", IMAGE) as seen:
                servers.kill_primary()
                goes_on(seen)
                wait_until(lambda: is_whole(client), timeout_s=RECOVERED_S)
            client.shutdown()


def test_a_stopped_worker_answers_what_it_holds_while_others_take_over(
    project: Project, cluster_of_containers: Cluster, client: serve.Client
) -> None:
    """The lines that its code logs are those of the containers."""
    cluster_of_containers.has_workers(3)
    first = project.workers()[0]
    with slow_backend(client):
        cluster_of_containers.wait_until_whole()
        with cluster_of_containers.load("worker stopped, requests of 1.5 s", "/slow", None):
            docker("stop", first)
            assert inspect(first)["State"]["ExitCode"] == 0, logs(first)
        assert any("INFO slow [" in line and line.endswith("] an answer in 1.5 s") for line in logs(*project.workers()))
    docker("start", first)
    cluster_of_containers.wait_until_whole()


def test_two_of_three_workers_leave_under_load(project: Project, cluster_of_containers: Cluster) -> None:
    cluster_of_containers.has_workers(3)
    with cluster_of_containers.load("scale from 3 to 1") as seen:
        project.up(workers=1)
    assert len(project.workers()) == 1
    assert {json.loads(answer)["digit"] for answer in seen.answers} == {4}


@pytest.mark.skipif(not IS_LONG, reason="all containers once more take more than a minute: `make faults`")
def test_what_waits_outlives_the_containers(
    project: Project, cluster_of_containers: Cluster, client: serve.Client
) -> None:
    cluster_of_containers.has_workers(1)
    with slow_backend(client):
        cluster_of_containers.wait_until_whole()
        docker("stop", *project.workers())
        handle = client.get_handle("slow")
        waiting = [handle.submit(None) for _ in range(20)]
        project.take_down()
        project.up(workers=1)
        assert [request.result(timeout=RECOVERED_S) for request in waiting] == 20 * ["well"]
