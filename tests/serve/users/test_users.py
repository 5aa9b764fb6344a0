"""An instance on a broker with TLS, where owner, replicas, proxies and callers are different Redis users."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from penstock import handles, serve
from penstock.broker.defaults import default_url
from penstock.handles.errors import ConfigError, NotPermitted
from tests.security.test_refusals import NOTHING, limited
from tests.serve.cli.conftest import Ran, run
from tests.serve.conftest import StartClient
from tests.support.guarded import Guarded


def user_of_replica(request: serve.Request) -> Any:
    """Return the Redis user of the replica's process, and the passwords that its children would inherit."""
    child = subprocess.run(["env"], capture_output=True, text=True, check=True)
    inherited = [line for line in child.stdout.splitlines() if ":secret@" in line]
    return {"url": (default_url() or "").partition("?")[0], "data": request.data, "inherited": inherited}


@pytest.fixture
def client(cluster: str, guarded_by_users: Guarded) -> Iterator[serve.Client]:
    client = serve.start(
        redis_url=guarded_by_users.url("owner"),
        replica_redis_url=guarded_by_users.url("replica"),
        proxy_redis_url=guarded_by_users.url("proxy"),
        http_options={"port": 0},
    )
    with client:
        yield client


def test_every_part_serves_as_its_own_user(client: serve.Client, guarded_by_users: Guarded) -> None:
    client.create_backend("f", user_of_replica, ray_actor_options={"num_cpus": 0.1}, config={"num_replicas": 2})
    client.create_endpoint("e", backend="f", route="/e", methods=["POST"])
    replica: dict[str, Any] = {"url": guarded_by_users.url("replica").partition("?")[0], "data": 1, "inherited": []}

    assert client.http_url is not None
    assert httpx.post(f"{client.http_url}/e", json=1, timeout=20).json() == replica
    assert client.get_handle("e").remote(1).result(timeout=20) == replica
    with handles.connect(guarded_by_users.url("alice")) as connection:
        assert connection.get_handle("e").remote(1).result(timeout=20) == replica

    client.update_backend_config("f", {"max_concurrent_queries": 2})
    assert client.status()["backends"]["f"]["ready"] == 2
    assert "secret" not in repr(client)

    alice, owner = (guarded_by_users.url(name) for name in ("alice", "owner"))
    called, status = run("call", "e", "2", url=alice), run("status", url=owner)
    assert (called.code, status.code) == (0, 0), called.err + status.err
    assert '"data":2' in called.out
    assert "f" in status.out
    assert run("dead", "list", "f", "--json", url=owner) == Ran(0, "", "")

    client.delete_endpoint("e")
    client.delete_backend("f")


@pytest.mark.parametrize("name", ["replica_redis_url", "proxy_redis_url"])
def test_the_other_urls_of_the_broker_are_checked_before_anything_starts(name: str) -> None:
    def start(given: Any, **broker: Any) -> None:
        serve.start(**{name: given, **broker})

    with pytest.raises(TypeError, match=f"{name} must be a str, not int"):
        start(7, redis_url="redis://localhost")
    with pytest.raises(ConfigError, match="'http://localhost' is not a Redis URL"):
        start("http://localhost", redis_url="redis://localhost")
    with pytest.raises(ConfigError, match=f"{name} is another URL of the broker at redis_url"):
        start("redis://localhost")


@pytest.mark.parametrize("name", ["redis_url", "replica_redis_url", "proxy_redis_url"])
def test_an_instance_names_the_user_that_lacks_a_permission(name: str, start: StartClient, redis_url: str) -> None:
    def begin(url: str) -> None:
        client = start(**{name: url}, http_options={"port": 0})
        client.create_backend("f", user_of_replica, ray_actor_options={"num_cpus": 0.1})

    with limited(redis_url, *NOTHING) as url, pytest.raises(NotPermitted, match="'guest' may not do"):
        begin(url)
