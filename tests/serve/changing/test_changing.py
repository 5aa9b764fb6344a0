"""Changes under load: none fails a request, and each is live when its call returns."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from httpx import Client as HTTPClient, TransportError

from penstock import serve
from tests.serve.backends import SMALL, Slow, answering, replicas
from tests.serve.load import load
from tests.support.waiting import wait_until


def test_scaling_up_and_down_fails_no_request(client: serve.Client) -> None:
    client.create_backend("f", Slow, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f", route="/e")
    handle = client.get_handle("e")
    with load(lambda: handle.remote().result(timeout=30)) as calls:
        for number in (4, 1, 3, 1):
            client.update_backend_config("f", {"num_replicas": number})
            assert client.status()["backends"]["f"]["ready"] == number
            wait_until(lambda: len(replicas(client)) == number)  # noqa: B023 - called before the next
            calls.goes_on()


def test_new_code_is_live_when_the_update_returns_and_no_request_fails(web: serve.Client, http: HTTPClient) -> None:
    web.create_backend("f", Slow, "old", config={"num_replicas": 2}, ray_actor_options=SMALL)
    web.create_endpoint("e", backend="f", route="/e")
    with load(lambda: http.get("/e").raise_for_status().text) as calls:
        web.update_backend("f", Slow, "new")
        over_s = time.monotonic()
        calls.goes_on()
    assert set(calls.since(0)) == {"old", "new"}
    assert set(calls.since(over_s)) == {"new"}
    assert web.get_backend_config("f").num_replicas == 2


def test_new_code_that_cannot_start_leaves_the_old_code_serving(client: serve.Client) -> None:
    class Broken:
        def __init__(self) -> None:
            raise RuntimeError("no weights")

        def __call__(self, request: serve.Request) -> None: ...

    client.create_backend("f", answering("old"), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    before = replicas(client)
    with load(lambda: handle.remote().result(timeout=30)) as calls:
        with pytest.raises(serve.errors.BackendError, match="no weights") as raised:
            client.update_backend("f", Broken, config={"num_replicas": 2})
        calls.goes_on()
    assert "raise RuntimeError" in raised.value.traceback
    assert set(calls.since(0)) == {"old"}
    assert client.get_backend_config("f").num_replicas == 1
    wait_until(lambda: replicas(client) == before)


def test_a_configuration_applies_to_running_and_later_replicas(client: serve.Client) -> None:
    class Configured:
        threshold = 0.0

        def reconfigure(self, user_config: dict[str, float]) -> None:
            if user_config["threshold"] > 1:
                raise ValueError("a threshold is 0 to 1")
            self.threshold = user_config["threshold"]

        def __call__(self, request: serve.Request) -> float:
            return self.threshold

    client.create_backend(
        "f", Configured, config={"num_replicas": 2, "user_config": {"threshold": 0.25}}, ray_actor_options=SMALL
    )
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    with load(lambda: handle.remote().result(timeout=30)) as calls:
        client.update_backend_config("f", {"user_config": {"threshold": 0.5}})
        first_s = time.monotonic()
        calls.goes_on()
        with pytest.raises(serve.errors.BackendError, match="a threshold is 0 to 1"):
            client.update_backend_config("f", {"user_config": {"threshold": 2}})
        assert client.get_backend_config("f").user_config == {"threshold": 0.5}
        client.update_backend_config("f", {"num_replicas": 3})
        calls.goes_on()
    assert set(calls.since(0)) == {0.25, 0.5}
    assert set(calls.since(first_s)) == {0.5}


def test_traffic_is_live_at_every_proxy_and_handle_when_the_call_returns(start: Callable[..., serve.Client]) -> None:
    client = start(http_options={"port": 0, "proxies_per_node": 2})
    for tag in ("blue", "green"):
        client.create_backend(tag, answering(tag), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="blue", route="/e")
    handle = client.get_handle("e")
    url = f"{client.http_url}/e"
    for tag in ("green", "blue", "green"):
        client.set_traffic("e", {tag: 1.0})
        answers = set[str]()
        for _ in range(20):
            with HTTPClient() as http:  # each on its own connection, to one proxy or the other
                answers.add(http.get(url).text)
        assert answers == {tag}
        assert {handle.remote().result(timeout=10) for _ in range(20)} == {tag}
    client.set_traffic("e", {"blue": 0.5, "green": 0.5})
    assert {handle.remote().result(timeout=10) for _ in range(60)} == {"blue", "green"}
    by_handle = {str(n): handle.options(shard_key=str(n)).remote().result(timeout=10) for n in range(20)}
    assert set(by_handle.values()) == {"blue", "green"}
    for key, tag in by_handle.items():
        for _ in range(3):
            with HTTPClient() as http:
                assert http.get(url, headers={"x-serve-shard-key": key}).text == tag
    client.delete_endpoint("e")
    with HTTPClient() as http:
        assert http.get(url).status_code == 404


def test_shadow_traffic_is_copied_and_affects_no_caller(client: serve.Client) -> None:
    class Shadow:
        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, request: serve.Request) -> None:
            self.seen += 1
            raise RuntimeError("nobody hears this")

        def count(self, request: serve.Request) -> int:
            return self.seen

    client.create_backend("f", answering("real"), ray_actor_options=SMALL)
    client.create_backend("shadow", Shadow, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    client.create_endpoint("look", backend="shadow")
    handle, look = client.get_handle("e"), client.get_handle("look").options(method_name="count")
    client.shadow_traffic("e", "shadow", 1.0)
    assert [handle.remote().result(timeout=10) for _ in range(10)] == ["real"] * 10
    wait_until(lambda: look.remote().result(timeout=10) == 10)
    client.shadow_traffic("e", "shadow", 0)
    assert client.list_endpoints()["e"]["shadows"] == {}
    assert handle.remote().result(timeout=10) == "real"
    assert look.remote().result(timeout=10) == 10


def test_a_slow_and_full_shadow_backend_is_counted_and_affects_no_caller(web: serve.Client, http: HTTPClient) -> None:
    async def never(request: serve.Request) -> None:
        await asyncio.sleep(3600)

    config = {"max_queued_requests": 3, "max_concurrent_queries": 1, "graceful_shutdown_timeout_s": 0.1}
    web.create_backend("f", answering("real"), ray_actor_options=SMALL)
    web.create_backend("shadow", never, config=config, ray_actor_options=SMALL)
    web.create_endpoint("e", backend="f", route="/e")
    web.shadow_traffic("e", "shadow", 1.0)
    with load(lambda: http.get("/e").raise_for_status().text) as calls:
        calls.goes_on()
        wait_until(lambda: 'penstock_shadow_copies_total{backend="shadow",outcome="queued"} 3' in metrics(http))
        wait_until(lambda: counted(web, "shadow") == (2, 1))
        web.shadow_traffic("e", "shadow", 0)
        web.delete_backend("shadow", force=True)
        calls.goes_on()
    assert set(calls.since(0)) == {"real"}
    refused = next(line for line in metrics(http) if 'outcome="refused"' in line)
    assert int(refused.rpartition(" ")[2]) > 0


def counted(client: serve.Client, tag: str) -> tuple[int, int]:
    """Return the numbers of waiting and of running requests of a backend."""
    backend = client.status()["backends"][tag]
    return backend["queued"], backend["in_progress"]


def metrics(http: HTTPClient) -> list[str]:
    return http.get("/-/metrics").text.splitlines()


def test_a_deleted_backend_answers_its_queued_requests_first(client: serve.Client) -> None:
    client.create_backend("f", Slow, config={"max_concurrent_queries": 1}, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    futures = [handle.remote() for _ in range(20)]
    futures[0].result(timeout=10)
    client.delete_endpoint("e")
    client.delete_backend("f")
    assert [future.result(timeout=10) for future in futures] == ["slow"] * 20
    assert client.list_backends() == {}
    assert client.status()["backends"] == {}


def unsettled(client: serve.Client) -> int:
    return sum(counted(client, "f"))


def test_a_forced_deletion_refuses_queued_requests_at_once(client: serve.Client) -> None:
    class Forever:
        def __call__(self, request: serve.Request) -> None:
            threading.Event().wait(60)

    client.create_backend("f", Forever, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    futures = [client.get_handle("e").remote() for _ in range(5)]
    futures[0].cancel()
    wait_until(lambda: unsettled(client) >= 4)
    client.delete_endpoint("e")
    client.delete_backend("f", force=True)
    for future in futures[1:]:
        with pytest.raises(serve.errors.BackendNotFound):
            future.result(timeout=10)


def test_a_killed_replica_delays_requests_and_fails_none(client: serve.Client) -> None:
    client.create_backend("f", Slow, config={"num_replicas": 2}, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    before = replicas(client)
    with load(lambda: handle.remote().result(timeout=30), threads=8) as calls:
        os.kill(next(iter(before.values())), signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until(lambda: len(replicas(client)) == 2 and replicas(client) != before)
        calls.goes_on()
    assert killed_s > 0
    assert len(replicas(client).keys() & before.keys()) == 1


def test_a_killed_proxy_is_restarted_on_its_port(web: serve.Client) -> None:
    web.create_backend("f", answering("here"), ray_actor_options=SMALL)
    web.create_endpoint("e", backend="f", route="/e")
    (proxy,) = web.status()["proxies"].values()
    os.kill(proxy["pid"], signal.SIGKILL)

    def is_back() -> bool:
        with HTTPClient() as http:
            try:
                return http.get(f"{web.http_url}/e").text == "here"
            except TransportError:
                return False

    wait_until(is_back)
    assert next(iter(web.status()["proxies"].values()))["pid"] != proxy["pid"]
