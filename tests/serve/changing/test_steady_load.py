"""Every change under a steady load over HTTP and handles, also with the controller killed during the change.

No request may fail or be lost. `make changes` prints how many were sent and answered.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from httpx import Client as HTTPClient

from penstock import serve
from tests.serve.backends import SMALL, answering
from tests.serve.controller.test_controller import kill_controller
from tests.serve.load import load
from tests.support.brokers import Brokers, clean

INSTANCE = "steady"

Change = Callable[[serve.Client], None]


class Model:
    """Accepts batches and a configuration, so that every field of the configuration applies."""

    def __init__(self, name: str) -> None:
        self.name = name

    def reconfigure(self, user_config: Any) -> None: ...

    @serve.accept_batch
    async def __call__(self, requests: list[serve.Request]) -> list[str]:
        await asyncio.sleep(0.01)
        return [self.name] * len(requests)


class Broken(Model):
    def __init__(self) -> None:
        raise RuntimeError("no weights")


FIELDS: dict[str, Any] = {
    "num_replicas": 2,
    "max_batch_size": 4,
    "batch_wait_timeout": 0.005,
    "batch_share": 0.2,
    "max_concurrent_queries": 3,
    "user_config": {"threshold": 0.5},
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2},
    "max_queued_requests": 5_000,
    "max_queued_bytes": 2**29,
    "max_deliveries": 5,
    "max_dead_letters": 5_000,
    "graceful_shutdown_timeout_s": 10,
    "health_check_period_s": 5,
    "health_check_timeout_s": 20,
    "allow_pickle": True,
    "result_ttl_s": 600,
    "max_result_bytes": 2**28,
    "retry": {"max_attempts": 2},
}


def scale(client: serve.Client) -> None:
    for number in (4, 1):
        client.update_backend_config("model", {"num_replicas": number})


def roll_over_by_traffic(client: serve.Client) -> None:
    client.create_backend("next", Model, "next", ray_actor_options=SMALL)
    for share in (0.1, 0.5, 1.0):
        client.set_traffic("e", {"model": 1 - share, "next": share})
    client.set_traffic("e", {"model": 1.0})
    client.delete_backend("next")


def update_every_field(client: serve.Client) -> None:
    assert FIELDS.keys() == serve.BackendConfig.model_fields.keys()
    before = client.get_backend_config("model").model_dump()
    for name, value in FIELDS.items():
        client.update_backend_config("model", {name: value})
    client.update_backend_config("model", before)


def fail_to_construct(client: serve.Client) -> None:
    with pytest.raises(serve.errors.BackendError, match="no weights"):
        client.update_backend("model", Broken)


def delete_an_unused_backend(client: serve.Client) -> None:
    client.create_backend("unused", answering(0), ray_actor_options=SMALL)
    client.delete_backend("unused")


CHANGES: dict[str, Change] = {
    "scale 1 → 4 → 1": scale,
    "roll over to a new version by traffic": roll_over_by_traffic,
    "a config update of each field": update_every_field,
    "a version whose constructor raises": fail_to_construct,
    "delete of an unused backend": delete_an_unused_backend,
}


@pytest.fixture(scope="module")
def client(cluster: str, brokers: Brokers) -> Iterator[serve.Client]:
    with clean(brokers.url("embedded")) as url:
        client = serve.start(redis_url=url, instance=INSTANCE, http_options={"port": 0})
        client.create_backend("model", Model, "model", ray_actor_options=SMALL)
        client.create_endpoint("e", backend="model", route="/e")
        yield client
        client.shutdown()


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, int, int, int, int]]]:
    """Rows of changes, with the numbers of requests sent and answered over HTTP and by handles."""
    rows: list[tuple[str, int, int, int, int]] = []
    yield rows
    print(f"\n\n{'':60}{'HTTP':>16}{'handles':>18}\n{'under a steady load':60}" + 2 * f"{'sent':>8}{'answered':>10}")
    for what, *numbers in rows:
        print(f"{what:60}" + "".join(f"{number:>{8 + 2 * (at % 2)}}" for at, number in enumerate(numbers)))


@pytest.mark.parametrize("killed", [False, True], ids=["", "controller killed"])
@pytest.mark.parametrize("what", CHANGES)
def test_no_change_fails_a_request(
    client: serve.Client, table: list[tuple[str, int, int, int, int]], what: str, killed: bool
) -> None:
    handle = client.get_handle("e")
    failures: list[BaseException] = []

    def change() -> None:
        try:
            CHANGES[what](client)
        except BaseException as e:
            failures.append(e)

    with HTTPClient(timeout=30) as http:
        url = f"{client.http_url}/e"
        with (
            load(lambda: http.get(url).raise_for_status().text, threads=2) as web,
            load(lambda: handle.remote().result(timeout=30), threads=2) as direct,
        ):
            changing = threading.Thread(target=change)
            changing.start()
            if killed:
                kill_controller(INSTANCE)
            changing.join(90)
            assert not changing.is_alive()
    assert failures == []
    row = f"{what}; the controller killed" if killed else what
    table.append((row, web.sent, len(web.answers), direct.sent, len(direct.answers)))
    assert (web.sent, direct.sent) == (len(web.answers), len(direct.answers))
    assert set(web.since(0)) | set(direct.since(0)) <= {"model", "next"}
