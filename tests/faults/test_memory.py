"""A broker without memory refuses new requests, and accepted ones go on."""

from __future__ import annotations

import httpx
import pytest
from redis import Redis

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from tests.faults.conftest import StartClient
from tests.faults.load.backends import Journal, Poisonable
from tests.serve.backends import SMALL
from tests.support.waiting import wait_until


def test_a_full_broker_refuses_new_work_and_completes_what_it_took(
    start: StartClient, broker: EmbeddedServer, journal: Journal
) -> None:
    client = start(http_options={"port": 0})
    config = {"num_replicas": 3, "max_deliveries": 2}
    client.create_backend("work", Poisonable, journal.folder, 1.5, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    handle = client.get_handle("work")
    accepted = [handle.remote(f"r{n}") for n in range(30)]
    wait_until(lambda: len(journal.starts()) == 30)
    poison = handle.remote("poison")
    wait_until(lambda: journal.starts()["poison"])
    with Redis.from_url(broker.url) as redis:
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(serve.errors.Overloaded, match="has no memory left"):
                handle.remote("new").result(timeout=10)
            response = httpx.post(f"{client.http_url}/job", json="new", timeout=10)
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "Overloaded"
            assert int(response.headers["retry-after"]) >= 1
            assert [call.result(timeout=30) for call in accepted] == [f"r{n}" for n in range(30)]
            with pytest.raises(serve.errors.DeliveryLimitExceeded):
                poison.result(timeout=30)
            assert len(client.dead_letters("work")) == 1
        finally:
            redis.config_set("maxmemory", 0)
    assert handle.remote("after").result(timeout=10) == "after"
    assert "new" not in journal.starts()
