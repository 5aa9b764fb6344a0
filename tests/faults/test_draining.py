"""SIGTERM: what was begun is finished, and nothing new is taken."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.group.member import GROUP
from penstock.broker.wire.keys import Keys
from tests.faults.conftest import Scale, StartClient
from tests.faults.load.backends import Held, Holding, Journal
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import serve_work
from tests.serve.backends import SMALL, replicas
from tests.support.waiting import wait_until


def test_a_draining_proxy_finishes_its_requests_and_refuses_new_ones(start: StartClient, journal: Journal) -> None:
    client = start(http_options={"port": 0, "drain_delay_s": 0})
    serve_work(client, journal, Holding)
    (proxy,) = client.status()["proxies"].values()
    with traffic(client, rate=40, for_s=0.25, method="later", ways=("http",)) as load:
        wait_until(lambda: not load.sending and len(journal.starts()) == load.sent)
        os.kill(proxy["pid"], signal.SIGTERM)
        wait_until(lambda: refuses(str(client.http_url)))
        assert load.outcomes.answered == {}
        journal.go.touch()
    assert len(load.outcomes.answered) == load.sent
    wait_until(lambda: not Path(f"/proc/{proxy['pid']}").exists())
    wait_until(lambda: not refuses(str(client.http_url)), timeout_s=30)
    assert httpx.get(f"{client.http_url}/-/healthz").text == "ok"


def test_a_draining_replica_finishes_its_requests_and_is_replaced(start: StartClient, journal: Journal) -> None:
    client = start(http_options={"location": None})
    serve_work(client, journal, Holding)
    before = replicas(client, "work")
    gone, pid = next(iter(before.items()))
    with traffic(client, rate=40, for_s=3, method="later", ways=("handle",)) as load:
        wait_until(lambda: len(journal.starts()) > 20)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: gone not in replicas(client, "work"))
        assert load.outcomes.answered == {}
        journal.go.touch()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert len(load.outcomes.answered) == load.sent
    assert set(journal.starts().values()) == {1}
    wait_until(lambda: len(replicas(client, "work")) == 3 and gone not in replicas(client, "work"))


def test_a_draining_replica_gives_unstarted_claims_back(
    start: StartClient, broker: EmbeddedServer, journal: Journal
) -> None:
    """At once, and not when what it runs has come to its end."""
    client = start(http_options={"location": None})
    # One batch runs, and the next one waits to be filled.
    config = {"max_batch_size": 2, "batch_wait_timeout": 60.0, "max_concurrent_queries": 2}
    client.create_backend("work", Held, journal.folder, 0.0, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work")
    ((replica, pid),) = replicas(client, "work").items()
    handle, stream = client.get_handle("work"), Keys("default").requests("work")
    running = [handle.remote("r0"), handle.remote("r1")]
    wait_until(lambda: len(journal.starts()) == 2)
    given_back = handle.remote("r2")
    with Redis.from_url(broker.url) as redis:

        def held_by(consumer: str) -> int:
            return sum(
                one["pending"] for one in redis.xinfo_consumers(stream, GROUP) if one["name"] == consumer.encode()
            )

        wait_until(lambda: held_by(replica) == 3)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: held_by(replica) == 2)
    # The replica that comes in its place has it while the old one still runs.
    fills = handle.remote("r3")
    wait_until(lambda: len(journal.starts()) == 4, timeout_s=30)
    assert Path(f"/proc/{pid}").exists()
    assert not any(call.done() for call in running)
    journal.go.touch()
    assert [call.result(timeout=30) for call in (*running, given_back, fills)] == ["r0", "r1", "r2", "r3"]
    assert set(journal.starts().values()) == {1}
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_replica_that_drains_too_long_is_killed_and_its_requests_redelivered(
    start: StartClient, journal: Journal, scale: Scale
) -> None:
    client = start(http_options={"location": None})
    config = {"num_replicas": 2, "graceful_shutdown_timeout_s": 0.5}
    client.create_backend("work", Holding, journal.folder, 0.02, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work")
    call = client.get_handle("work").options(method_name="later").remote("r0")
    wait_until(journal.starts)
    (pid,) = (int(path.name) for path in journal.folder.iterdir() if path.read_text())
    began_s = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: journal.starts()["r0"] == 2)
    assert 0.5 <= time.monotonic() - began_s < 0.5 + scale.take_over_s
    journal.go.touch()
    assert call.result(timeout=10) == "r0"
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/-/healthz", timeout=5)
    except httpx.NetworkError:
        return True
    return False
