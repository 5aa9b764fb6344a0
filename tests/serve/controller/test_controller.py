"""The controller is killed and restarted; unhealthy replicas are replaced."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import httpx
import pytest
import ray

from penstock import serve
from penstock.broker.queue.group.claimer import Claimer
from penstock.serve.first_actors import FirstProxy
from penstock.serve.ray_actors.lifetime import NAMESPACE, actor_name
from penstock.workers.consuming.policies import claim_watch
from tests.serve.backends import SMALL, Slow, answering, replicas
from tests.serve.conftest import StartClient
from tests.serve.load import load
from tests.support.waiting import wait_until


def controller_pid(instance: str = "default") -> int:
    controller = cast(Any, ray.get_actor(actor_name(instance, "controller"), namespace=NAMESPACE))
    return cast(int, ray.get(controller.pid.remote()))


def kill_controller(instance: str = "default") -> None:
    """Kill it with SIGKILL, as the kernel does when memory is exhausted."""
    os.kill(controller_pid(instance), signal.SIGKILL)


def test_a_restarted_controller_adopts_the_running_replicas(client: serve.Client) -> None:
    client.create_backend("f", Slow, config={"num_replicas": 2}, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle, before = client.get_handle("e"), replicas(client)
    with load(lambda: handle.remote().result(timeout=30)) as calls:
        kill_controller()
        calls.goes_on()
        client.update_backend_config("f", {"num_replicas": 3})
    assert replicas(client).items() > before.items()
    os.kill(next(iter(before.values())), signal.SIGKILL)
    wait_until(lambda: len(replicas(client)) == 3 and not replicas(client).items() >= before.items())


def test_the_controller_adopts_the_proxy_that_starts_beside_it(
    start: StartClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, begin = list[Any](), FirstProxy.start

    def recorded(first: FirstProxy, http: Mapping[str, Any]) -> Any:
        begun.append(begin(first, http))
        return begun[-1]

    monkeypatch.setattr(FirstProxy, "start", recorded)
    client = start(http_options={"port": 0})
    (proxy,) = begun
    report: Any = ray.get(proxy.ready.remote())
    assert report["url"] == client.http_url
    os.kill(report["pid"], signal.SIGKILL)

    def is_replaced() -> bool:
        others = [proxy for proxy in client.status()["proxies"].values() if proxy["pid"] != report["pid"]]
        return [proxy["state"] for proxy in others] == ["ready"]

    wait_until(is_replaced)
    assert httpx.get(f"{client.http_url}/-/healthz").status_code == 200


CHANGES: dict[str, Callable[[serve.Client], None]] = {
    "scaling": lambda client: client.update_backend_config("f", {"num_replicas": 3}),
    "new code": lambda client: client.update_backend("f", Slow, "new"),
    "a new backend": lambda client: client.create_backend("g", Slow, ray_actor_options=SMALL),
    "deleting": lambda client: client.delete_backend("unused"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_survives_the_death_of_the_controller_during_it(
    client: serve.Client, change: Callable[[serve.Client], None]
) -> None:
    client.create_backend("f", Slow, ray_actor_options=SMALL)
    client.create_backend("unused", answering(0), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    with load(lambda: handle.remote().result(timeout=30)) as calls:
        changing = threading.Thread(target=change, args=(client,))
        changing.start()
        kill_controller()
        changing.join(60)
        assert not changing.is_alive()
        calls.goes_on()
    wanted = {tag: config.num_replicas for tag, config in client.list_backends().items()}
    wait_until(lambda: {tag: len(replicas(client, tag)) for tag in wanted} == wanted)


def test_a_replica_whose_health_check_fails_is_replaced(client: serve.Client) -> None:
    class Falling:
        def __init__(self) -> None:
            self.ill = False

        def check_health(self) -> None:
            if self.ill:
                raise RuntimeError("I do not feel well")

        def __call__(self, request: serve.Request) -> int:
            self.ill = self.ill or bool(request.data)
            return os.getpid()

    client.create_backend("f", Falling, config={"health_check_period_s": 0.2}, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    ill = handle.remote(True).result(timeout=10)
    wait_until(lambda: handle.remote().result(timeout=10) != ill)


def test_a_replica_that_has_stopped_claiming_is_replaced(client: serve.Client) -> None:
    class Stopping:
        def __call__(self, request: serve.Request) -> int:
            if request.data:
                # Simulates a defect of Penstock: claims are never answered any more.
                def drop(*args: Any, **options: Any) -> None: ...

                setattr(Claimer, "claim", drop)  # noqa: B010 - for type checkers a method is not to be replaced
                setattr(claim_watch, "STOPPED_AFTER_S", 1.0)  # noqa: B010 - nor a constant
            return os.getpid()

    client.create_backend("f", Stopping, config={"health_check_period_s": 0.2}, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    stopped = handle.remote(True).result(timeout=10)
    # A claim that was in flight may serve one more request.
    wait_until(lambda: handle.remote().result(timeout=60) != stopped, timeout_s=120)


def test_a_replica_that_hangs_is_replaced(client: serve.Client) -> None:
    class Hanging:
        async def __call__(self, request: serve.Request) -> int:
            if request.data:
                threading.Event().wait(60)  # blocks the event loop, as faulty user code may
            return os.getpid()

    config = {"health_check_period_s": 0.2, "health_check_timeout_s": 0.5, "max_deliveries": 2}
    client.create_backend("f", Hanging, config=config, ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    handle = client.get_handle("e")
    healthy = handle.remote().result(timeout=10)
    hanging = handle.remote(True)
    with pytest.raises(serve.errors.DeliveryLimitExceeded):
        hanging.result(timeout=30)
    assert handle.remote().result(timeout=30) != healthy


def test_a_version_that_fails_later_is_retried_and_its_error_is_reported(client: serve.Client, tmp_path: Any) -> None:
    broken = tmp_path / "broken"

    class Fragile:
        def __init__(self, broken: str) -> None:
            if os.path.exists(broken):
                raise RuntimeError("the weights are gone")

        def __call__(self, request: serve.Request) -> str:
            return "well"

    client.create_backend("f", Fragile, str(broken), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    broken.touch()
    (replica,) = replicas(client).values()
    os.kill(replica, signal.SIGKILL)
    waiting = client.get_handle("e").remote()
    wait_until(lambda: "the weights are gone" in str(client.status()["backends"]["f"]["failing"]))
    broken.unlink()
    assert waiting.result(timeout=20) == "well"
    wait_until(lambda: client.status()["backends"]["f"]["failing"] is None)
