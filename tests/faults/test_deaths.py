"""Whatever is killed, every request is answered or refused by name: what was sent is what was answered and refused."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from tests.faults.conftest import Scale, StartClient
from tests.faults.injected.tcp_proxy import TcpProxy
from tests.faults.load.backends import Counting, HeldAtStart, Holding, Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import Outcomes, Traffic, traffic
from tests.serve.backends import SMALL, replicas
from tests.serve.controller.test_controller import kill_controller
from tests.support.waiting import wait_until

SERVICE_S = 0.02


def serve_work(client: serve.Client, journal: Journal, code: type[Counting] = Counting) -> None:
    """Serve the endpoint ``work`` from three replicas."""
    client.create_backend("work", code, journal.folder, SERVICE_S, config={"num_replicas": 3}, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])


def kill_a_replica(client: serve.Client) -> bool:
    """With -9, if there is another to take over from it; False if not, as where Ray starts them slower than that."""
    ready = [pid for pid in replicas(client, "work").values() if Path(f"/proc/{pid}").exists()]
    with suppress(ProcessLookupError):
        if len(ready) > 1:
            os.kill(random.choice(ready), signal.SIGKILL)
            return True
    return False


def every(load: Traffic, pause_s: float, harm: Callable[[], object]) -> int:
    """Do harm again and again while the load is sent; return how often it was done. What cannot be is tried again."""
    done, next_s = 0, time.monotonic() + pause_s / 2
    while load.sending:
        time.sleep(0.05)
        if time.monotonic() >= next_s and harm() is not False:
            done, next_s = done + 1, time.monotonic() + pause_s
    return done


def check(seen: Outcomes, journal: Journal) -> int:
    """Nothing is lost, nothing is answered wrongly, nothing that was not run is answered. Return what ran twice."""
    starts = journal.starts()
    assert seen.wrong == []
    assert seen.lost == 0
    assert seen.sent == len(seen.answered) + seen.refused.total() + len(seen.cut)
    assert seen.answered.keys() <= starts.keys()
    return sum(count > 1 for name, count in starts.items() if name in seen.names)


def test_killed_replicas_cost_no_caller_an_error(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        kills = every(load, scale.every_s, lambda: kill_a_replica(client))
    seen = load.outcomes
    twice = check(seen, journal)
    table.add(Row.of("a replica killed", scale.for_s, seen, twice=twice, notes=f"{kills} killed"))
    assert kills > 0
    assert seen.refused.total() + len(seen.cut) == 0
    assert seen.quantile_s(0.99) <= scale.take_over_s + SERVICE_S


def test_a_deadline_is_kept_while_no_replica_is_alive(start: StartClient, journal: Journal) -> None:
    client = start(http_options={"port": 0, "request_timeout_s": 0.5})
    journal.go.touch()
    client.create_backend("work", HeldAtStart, journal.folder, SERVICE_S, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    (pid,) = replicas(client, "work").values()
    journal.go.unlink()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    began_s = time.monotonic()
    response = httpx.post(f"{client.http_url}/job", json="late")
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "RequestTimeout"
    assert 0.45 <= time.monotonic() - began_s < 4
    with pytest.raises(serve.errors.RequestTimeout):
        client.get_handle("work").options(timeout_s=0.5).remote("later").result(timeout=10)
    journal.go.touch()
    assert client.get_handle("work").remote("patient").result(timeout=30) == "patient"
    assert journal.starts() == {"patient": 1}


def test_requests_that_killed_proxies_had_accepted_run_once(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    """Who was connected to one that dies is cut off, which nobody can mend. The other one on the port goes on."""
    client = start()
    serve_work(client, journal)

    def kill_a_proxy() -> bool:
        proxies = [one["pid"] for one in client.status()["proxies"].values() if one.get("pid")]
        with suppress(ProcessLookupError):
            if len(proxies) > 1:
                os.kill(random.choice(proxies), signal.SIGKILL)
                return True
        return False

    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        kills = every(load, scale.every_s, kill_a_proxy)
    seen, starts = load.outcomes, journal.starts()
    twice = check(seen, journal)
    ran = len(seen.cut & starts.keys())
    table.add(
        Row.of(
            "a proxy killed", scale.for_s, seen, twice=twice, notes=f"{kills} killed; {ran} of those cut off had run"
        )
    )
    assert kills > 0
    assert seen.refused.total() == 0
    assert twice == 0
    # At the moment of a death: what was in flight, and who was about to connect to it.
    assert len(seen.cut) <= kills * scale.rate


def test_requests_of_a_proxy_that_died_do_not_run_again_at_its_successor(start: StartClient, journal: Journal) -> None:
    client = start(http_options={"port": 0})
    serve_work(client, journal, Holding)
    with traffic(client, rate=40, for_s=0.25, method="later", ways=("http",)) as load:
        wait_until(lambda: not load.sending)
        wait_until(lambda: client.status()["backends"]["work"]["queued"] == 0 and len(journal.starts()) == load.sent)
        (proxy,) = client.status()["proxies"].values()
        os.kill(proxy["pid"], signal.SIGKILL)
    assert len(load.outcomes.cut) == load.sent
    journal.go.touch()
    wait_until(lambda: client.status()["backends"]["work"]["served"] == load.sent)
    # The proxy that replaces it serves on the same port, and nothing of the old one is run again.
    with traffic(client, rate=40, for_s=0.25, ways=("http",), prefix="later") as after:
        pass
    assert len(after.outcomes.answered) + len(after.outcomes.cut) == after.sent
    assert set(journal.starts().values()) == {1}


def test_killed_controllers_cost_no_caller_an_error(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        kills = every(load, scale.every_s, kill_controller)
    seen = load.outcomes
    twice = check(seen, journal)
    table.add(Row.of("the controller killed", scale.for_s, seen, twice=twice, notes=f"{kills} killed"))
    assert kills > 0
    assert seen.refused.total() + len(seen.cut) + twice == 0


def test_accepted_requests_are_answered_after_the_broker_was_killed(
    start: StartClient, broker: EmbeddedServer, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)

    def kill_the_broker() -> bool:
        if broker.pid is None:
            return False
        os.kill(broker.pid, signal.SIGKILL)
        return True

    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        kills = every(load, scale.every_s, kill_the_broker)
    seen = load.outcomes
    twice = check(seen, journal)
    table.add(Row.of("Redis restarted", scale.for_s, seen, twice=twice, notes=f"{kills} times, with -9"))
    assert kills > 0
    assert set(seen.refused) <= {"BrokerUnavailable"}
    assert len(seen.cut) == 0


def test_accepted_requests_are_answered_after_connections_were_cut(
    start: StartClient, broker: EmbeddedServer, journal: Journal, scale: Scale, table: Table
) -> None:
    with TcpProxy(broker.url) as between:
        client = start(redis_url=between.url)
        serve_work(client, journal)
        with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
            every(load, scale.every_s / 5, lambda: between.cut(random.uniform(0.0, 0.5)))
        client.shutdown()
    seen = load.outcomes
    twice = check(seen, journal)
    table.add(Row.of("connections cut", scale.for_s, seen, twice=twice, notes=f"{between.cuts} cut"))
    assert between.cuts > 0
    assert set(seen.refused) <= {"BrokerUnavailable"}
    assert len(seen.cut) == 0
