"""Autoscaling with real replicas."""

import asyncio
import os
import signal
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from httpx import Client as HTTPClient, TransportError

from penstock import serve
from tests.serve.backends import SMALL, answering, replicas
from tests.serve.controller.test_controller import controller_pid
from tests.support.waiting import wait_until


class Busy:
    """Keeps a replica busy for a tenth of a second."""

    async def __call__(self, request: serve.Request) -> int:
        await asyncio.sleep(0.1)
        return os.getpid()


def create(client: serve.Client, **autoscaling: Any) -> serve.ServeHandle:
    config = {
        "max_concurrent_queries": 1,
        "autoscaling_config": {"max_replicas": 4, "target_queue_per_replica": 4.0, **autoscaling},
    }
    client.create_backend("f", Busy, config=config, ray_actor_options=SMALL)
    client.create_endpoint("f", backend="f")
    return client.get_handle("f")


def test_a_backlog_scales_up_and_a_lull_scales_down(client: serve.Client) -> None:
    handle = create(client, downscale_delay_s=2.0)
    assert len(replicas(client)) == 1
    futures = [handle.remote(n) for n in range(150)]
    asked = time.monotonic()
    wait_until(lambda: client.status()["backends"]["f"]["wanted"] == 4)
    took_s = time.monotonic() - asked
    print(f"{took_s:.2f} s after the step, four replicas were wanted")
    assert took_s < 5.0  # one replica would need 15 s
    pids = {future.result(60) for future in futures}
    assert len(pids) > 1
    wait_until(lambda: len(replicas(client)) == 1, 30)
    assert handle.remote(1).result(10)


def test_an_idle_backend_has_no_replica_and_the_next_request_starts_one(client: serve.Client) -> None:
    handle = create(client, min_replicas=0, downscale_delay_s=0.5)
    wait_until(lambda: not replicas(client), 30)
    assert client.status()["backends"]["f"]["wanted"] == 0
    futures = [handle.remote(n) for n in range(10)]
    assert all(future.result(60) for future in futures)


def test_new_code_is_tried_before_a_backend_scales_to_zero(client: serve.Client) -> None:
    """Otherwise the next request would be the first to meet an error of the new code."""

    class Broken:
        def __init__(self) -> None:
            raise ValueError("the weights are missing")

        def __call__(self, request: serve.Request) -> None: ...

    handle = create(client, min_replicas=0, downscale_delay_s=0.1)
    before = handle.remote(1).result(60)
    wait_until(lambda: not replicas(client), 30)
    with pytest.raises(serve.errors.BackendError, match="the weights are missing"):
        client.update_backend("f", Broken)
    assert handle.remote(1).result(60) != before
    client.update_backend("f", answering("new"))
    assert handle.remote(1).result(60) == "new"
    wait_until(lambda: not replicas(client), 30)


class Noting:
    """Writes the number of each request that it runs to a file."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def __call__(self, request: serve.Request) -> None:
        with self.notes.open("a") as notes:
            notes.write(f"{request.query_params['n']}\n")


def noting_at_rest(client: serve.Client, notes: Path) -> serve.ServeHandle:
    config = {"autoscaling_config": {"min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 0.5}}
    client.create_backend("f", Noting, notes, config=config, ray_actor_options=SMALL)
    client.create_endpoint("f", backend="f", route="/f")
    wait_until(lambda: not replicas(client), 30)
    return client.get_handle("f")


@contextmanager
def controller_stopped() -> Generator[int]:
    """Stop the controller, so that no backend scales up meanwhile; yield its process id."""
    pid = controller_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):  # the test has killed it
            os.kill(pid, signal.SIGCONT)


def once_each(notes: Path, count: int) -> bool:
    return sorted(map(int, notes.read_text().split())) == list(range(count))


def test_a_configuration_is_tried_before_a_backend_scales_to_zero(client: serve.Client) -> None:
    class Tunable:
        def reconfigure(self, config: str) -> None:
            if config == "bad":
                raise ValueError("no such tune")
            self.tune = config

        def __call__(self, request: serve.Request) -> str:
            return self.tune

    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 0.1}
    config = {"user_config": "first", "autoscaling_config": scaling}
    client.create_backend("f", Tunable, config=config, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    wait_until(lambda: not replicas(client), 30)
    with pytest.raises(serve.errors.BackendError, match="no such tune"):
        client.update_backend_config("f", {"user_config": "bad"})
    assert handle.remote().result(60) == "first"
    client.update_backend_config("f", {"user_config": "second"})
    assert handle.remote().result(60) == "second"
    wait_until(lambda: not replicas(client), 30)


def test_a_change_does_not_raise_the_error_of_the_change_before_it(client: serve.Client, tmp_path: Path) -> None:
    """The replica that could not start had read another configuration than the second call waits for."""
    gate = tmp_path / "gate"

    class Tunable:
        def __init__(self, gate: Path) -> None:
            self.gate = gate

        def reconfigure(self, tune: str) -> None:
            if tune == "bad":
                raise ValueError("no such tune")
            wait_until(self.gate.exists)
            self.tune = tune

        def __call__(self, request: serve.Request) -> str:
            return self.tune

    gate.touch()
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 0.1}
    config = {"user_config": "first", "autoscaling_config": scaling}
    client.create_backend("f", Tunable, gate, config=config, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    wait_until(lambda: not replicas(client), 30)

    gate.unlink()
    with pytest.raises(serve.errors.BackendError, match="no such tune"):
        client.update_backend_config("f", {"user_config": "bad"})
    undone = client.status()["backends"]["f"]["config_version"]
    with ThreadPoolExecutor(1) as thread:
        update = thread.submit(client.update_backend_config, "f", {"user_config": "second"})
        try:
            wait_until(lambda: client.status()["backends"]["f"]["config_version"] > undone)
            assert client.status()["backends"]["f"]["failing"] is None
        finally:
            gate.touch()
        update.result(60)
    assert client.get_handle("e").remote().result(60) == "second"


def test_requests_that_wait_for_a_replica_survive_the_controller(client: serve.Client, tmp_path: Path) -> None:
    handle = noting_at_rest(client, tmp_path / "notes")
    with controller_stopped() as controller:
        before = [handle.remote(n=n) for n in range(5)]
        wait_until(lambda: client.status()["backends"]["f"]["queued"] == 5)
        os.kill(controller, signal.SIGKILL)
    after = [handle.remote(n=n) for n in range(5, 10)]
    for future in before + after:
        future.result(60)
    assert once_each(tmp_path / "notes", 10)


def test_requests_that_wait_for_a_replica_survive_the_proxy(
    web: serve.Client, http: HTTPClient, tmp_path: Path
) -> None:
    """Its clients lose their connections, but each accepted request runs exactly once."""
    handle = noting_at_rest(web, tmp_path / "notes")
    (proxy,) = web.status()["proxies"].values()
    with ThreadPoolExecutor(5) as threads:
        with controller_stopped():
            accepted = [threads.submit(http.get, "/f", params={"n": n}) for n in range(5)]
            wait_until(lambda: web.status()["backends"]["f"]["queued"] == 5)
            os.kill(proxy["pid"], signal.SIGKILL)
            futures = [handle.remote(n=n) for n in range(5, 10)]
            assert all(isinstance(one.exception(), TransportError) for one in accepted)
        for future in futures:
            future.result(60)
    wait_until(lambda: web.status()["backends"]["f"]["served"] == 10)
    assert once_each(tmp_path / "notes", 10)
    wait_until(lambda: answers(http), 30)


def answers(http: HTTPClient) -> bool:
    try:
        return http.get("/f", params={"n": 10}).status_code == 200
    except TransportError:
        return False  # its proxy is not back yet


def test_the_bounds_can_be_changed_while_the_backend_serves(client: serve.Client) -> None:
    handle = create(client, downscale_delay_s=0.5)
    client.update_backend_config("f", {"autoscaling_config": {"min_replicas": 2, "max_replicas": 3}})
    wait_until(lambda: len(replicas(client)) == 2, 30)
    client.update_backend_config("f", {"autoscaling_config": None, "num_replicas": 1})
    wait_until(lambda: len(replicas(client)) == 1, 30)
    assert handle.remote(1).result(10)
