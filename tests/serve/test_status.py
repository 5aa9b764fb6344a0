"""What ``client.status()`` tells, to programs and to people."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock import serve
from penstock.serve.status import Status
from tests.serve.backends import SMALL, answering
from tests.serve.test_controller import kill_controller
from tests.waiting import wait_until


async def wait_for_ever(request: serve.Request) -> None:
    await asyncio.sleep(3600)


class Broken:
    def __init__(self) -> None:
        self.weights = open_the_weights()

    def __call__(self, request: serve.Request) -> Any:
        return self.weights


def open_the_weights() -> Any:
    raise FileNotFoundError("weights.bin")


def test_it_counts_replicas_and_requests(client: serve.Client) -> None:
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


def test_it_says_why_new_code_does_not_start_while_the_old_serves(client: serve.Client) -> None:
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


def test_it_prints_as_a_table() -> None:
    backend = {
        "version": "a1b2",
        "wanted": 2,
        "ready": 1,
        "starting": 1,
        "queued": 7,
        "in_progress": 3,
        "dead_letters": 0,
    }
    proxy = {"node": "0123456789abcdef", "url": "http://127.0.0.1:8000", "state": "ready", "pid": 7}
    status = Status(
        backends={
            "model": {
                **backend,
                "failing": 'ValueError: no\n  File "model.py"',
                "lacking": None,
                "refused": "version b2c3: 1 replica with GPU 1 each asked for, room for 0",
            }
        },
        proxies={"0": proxy},
        controller="away",
    )
    assert str(status).splitlines() == [
        "backend  version  wanted  ready  starting  queued  in progress  dead letters",
        "model    a1b2     2       1      1         7       3            0",
        "",
        "model is failing: ValueError: no",
        '      File "model.py"',
        "",
        "model refused version b2c3: 1 replica with GPU 1 each asked for, room for 0",
        "",
        "node          proxy  url                    state",
        "0123456789ab  0      http://127.0.0.1:8000  ready",
        "",
        "the controller is away: what runs serves on, and no change comes about",
    ]
