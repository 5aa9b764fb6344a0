"""``client.status()``, as a dict and as a table."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from penstock import serve
from penstock.serve.status.status import Status
from tests.serve.backends import SMALL, answering
from tests.serve.controller.test_controller import kill_controller
from tests.support.waiting import wait_until


async def wait_for_ever(request: serve.Request) -> None:
    await asyncio.sleep(3600)


class Broken:
    def __init__(self) -> None:
        self.weights = open_the_weights()

    def __call__(self, request: serve.Request) -> Any:
        return self.weights


def open_the_weights() -> Any:
    raise FileNotFoundError("weights.bin")


def test_the_status_counts_replicas_and_requests(client: serve.Client) -> None:
    config = {"num_replicas": 2, "max_concurrent_queries": 1}
    client.create_backend("f", wait_for_ever, config=config, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    futures = [client.get_handle("e").remote() for _ in range(5)]
    wait_until(lambda: client.status()["backends"]["f"]["in_progress"] == 2)
    backend = client.status()["backends"]["f"]
    assert backend["queued"] == 3
    assert (backend["wanted"], backend["ready"], backend["starting"], backend["dead_letters"]) == (2, 2, 0, 0)
    assert backend["failing"] is None
    for future in futures:
        future.cancel()
    wait_until(lambda: client.status()["backends"]["f"]["queued"] == 0)


def test_the_counts_include_replicas_that_are_gone(web: serve.Client) -> None:
    """The copies of shadow traffic count as well."""

    def run(request: serve.Request) -> str:
        time.sleep(0.01)
        if request.data == "fail":
            raise ValueError("as asked")
        return "well"

    @serve.accept_batch
    def together(requests: list[serve.Request]) -> list[None]:
        return [None] * len(requests)

    web.create_backend("f", run, config={"num_replicas": 2}, ray_actor_options=SMALL)
    batches = {"max_batch_size": 4, "batch_wait_timeout": 0.2}
    web.create_backend("shadow", together, config=batches, ray_actor_options=SMALL)
    web.create_endpoint("e", backend="f")
    web.shadow_traffic("e", "shadow", 1)
    handle = web.get_handle("e")

    def done(tag: str, *names: str) -> list[float]:
        backend = web.status()["backends"][tag]
        return [backend[name] for name in names]

    def ask(times: int, data: str) -> None:
        for future in [handle.remote(data) for _ in range(times)]:
            future.exception(timeout=20)

    ask(20, "well")
    ask(4, "fail")
    wait_until(lambda: done("f", "served", "failed") == [20, 4])
    assert 10 <= done("f", "mean_run_ms")[0] < 200
    wait_until(lambda: done("shadow", "served", "failed") == [24, 0])

    web.update_backend("f", answering("new"))
    web.update_backend_config("f", {"num_replicas": 1})
    assert done("f", "served", "failed") == [20, 4]
    ask(5, "new")
    wait_until(lambda: done("f", "served", "failed") == [25, 4])
    wait_until(lambda: done("shadow", "served") == [29])

    lines = httpx.get(f"{web.http_url}/-/metrics", timeout=10).text.splitlines()
    assert 'penstock_backend_served_total{backend="f"} 25' in lines
    assert 'penstock_backend_failed_total{backend="f"} 4' in lines
    assert 'penstock_backend_batch_size_sum{backend="shadow"} 29' in lines
    web.shadow_traffic("e", "shadow", 0)
    web.delete_backend("shadow")
    assert "shadow" not in web.status()["backends"]


def test_the_status_shows_why_new_code_does_not_start_while_the_old_code_serves(client: serve.Client) -> None:
    client.create_backend("f", answering("old"), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    old = client.status()["backends"]["f"]["version"]
    with pytest.raises(serve.errors.BackendError, match=r"weights\.bin"):
        client.update_backend("f", Broken)
    wait_until(lambda: client.status()["backends"]["f"]["version"] == old)
    backend = client.status()["backends"]["f"]
    assert backend["failing"] is None
    assert "FileNotFoundError: weights.bin" in backend["refused"]
    assert 'raise FileNotFoundError("weights.bin")' in backend["refused"]
    assert f"f refused {backend['refused'].splitlines()[0]}" in str(client.status())
    assert client.get_handle("e").remote().result(10) == "old"

    with pytest.raises(serve.errors.ConfigError, match="CPU 64"):
        client.update_backend("f", answering("new"), ray_actor_options={"num_cpus": 64})
    wait_until(lambda: "CPU 64" in client.status()["backends"]["f"]["refused"])
    kill_controller()
    client.update_backend("f", answering("new"))
    assert client.status()["backends"]["f"]["refused"] is None
    assert client.get_handle("e").remote().result(10) == "new"


def test_there_is_a_proxy_for_the_node(web: serve.Client) -> None:
    (proxy,) = web.status()["proxies"].values()
    assert proxy["url"] == web.http_url
    assert proxy["node"]
    assert proxy["state"] == "ready"


def test_the_status_prints_as_a_table() -> None:
    backend = {
        "version": "a1b2",
        "wanted": 2,
        "ready": 1,
        "starting": 1,
        "queued": 7,
        "in_progress": 3,
        "dead_letters": 0,
        "served": 1234567,
        "failed": 12,
        "mean_run_ms": 2.125,
    }
    proxy = {"node": "0123456789abcdef", "url": "http://127.0.0.1:8000", "state": "ready", "pid": 7}
    status = Status(
        backends={
            "model": {
                **backend,
                "failing": 'ValueError: no\n  File "model.py"',
                "lacking": None,
                "waits_for_nodes": "2 replicas with CPU 4 each requested, room for 1",
                "refused": "version b2c3: 1 replica with GPU 1 each requested, room for 0",
            }
        },
        endpoints={
            "other": {"route": None, "methods": ["GET"], "traffic": {"model": 1.0}, "shadows": {}},
            "ask": {
                "route": "/ask/{n:int}",
                "methods": ["GET", "POST"],
                "traffic": {"model": 0.75, "next": 0.25},
                "shadows": {"shadow": 0.5},
            },
        },
        proxies={"0": proxy},
        controller="waiting for Ray's head",
    )
    assert str(status).splitlines() == [
        "backend  version  replicas  queued  running  dead  served   failed  mean ms",
        "model    a1b2     1 of 2    7       3        0     1234567  12      2.125",
        "",
        "model is starting 1 replica",
        "",
        "model is failing: ValueError: no",
        '      File "model.py"',
        "",
        "model waits for nodes: 2 replicas with CPU 4 each requested, room for 1",
        "",
        "model refused version b2c3: 1 replica with GPU 1 each requested, room for 0",
        "",
        "endpoint  route         methods   traffic",
        "ask       /ask/{n:int}  GET POST  model 0.75, next 0.25, shadow shadowed 0.5",
        "other     -             GET       model 1",
        "",
        "node          proxy  url                    state",
        "0123456789ab  0      http://127.0.0.1:8000  ready",
        "",
        "the controller is waiting for Ray's head: running replicas serve, and changes wait",
    ]


@pytest.mark.parametrize(
    ("starting", "said"), [(0, ""), (1, "is starting 1 replica\n"), (10, "is starting 10 replicas\n")]
)
def test_a_table_fits_a_terminal(starting: int, said: str) -> None:
    counts = {"queued": 10_000, "in_progress": 100, "dead_letters": 7, "served": 1_234_567, "failed": 12}
    backend = {"version": "a1b2c3d4", "wanted": 2, "ready": 2, "starting": starting, "mean_run_ms": 2.125, **counts}
    backend |= {"failing": None, "lacking": None, "waits_for_nodes": None, "refused": None}
    status = Status(backends={"sentiment": backend}, endpoints={}, proxies={}, controller="alive")
    assert "2 of 2" in str(status)
    assert said in f"{status}\n"
    assert max(map(len, str(status).splitlines())) <= 80


def test_without_backends_there_is_no_table() -> None:
    empty = Status(backends={}, endpoints={}, proxies={}, controller="alive")
    assert str(empty) == "nothing is deployed"
