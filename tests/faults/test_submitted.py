"""A request that was submitted, or has an idempotency key, has one result, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from penstock import handles
from tests.faults.conftest import ASKED, Scale, StartClient
from tests.faults.load.backends import Journal, Stamping
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import SERVICE_S, check, every, serve_work
from tests.serve.backends import replicas
from tests.serve.controller.test_controller import kill_controller
from tests.support.waiting import wait_until

SUBMITTED = 10_000 if ASKED == "full" else 300


def test_proxies_are_killed_and_clients_that_repeat_with_a_key_lose_nothing(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    """Every request is answered, runs once, and its repetition gets the same answer (`traffic` compares them)."""
    client = start()
    serve_work(client, journal, Stamping)

    def kill_a_proxy() -> bool:
        proxies = [one["pid"] for one in client.status()["proxies"].values() if one.get("pid")]
        with suppress(ProcessLookupError):
            if len(proxies) > 1:
                os.kill(random.choice(proxies), signal.SIGKILL)
                return True
        return False

    with traffic(client, rate=scale.rate, for_s=scale.for_s, ways=("key",)) as load:
        kills = every(load, scale.every_s, kill_a_proxy)
    seen = load.outcomes
    twice, runs = check(seen, journal), journal.starts().total()
    table.add(Row.of("a proxy killed, keys", scale.for_s, seen, twice=twice, notes=f"{kills} killed, {runs} runs"))
    assert kills > 0
    assert (seen.wrong, seen.cut) == ([], set())
    assert seen.sent == len(seen.answered) == runs


def test_everything_but_redis_is_killed_and_every_result_is_fetched(
    start: StartClient, journal: Journal, table: Table
) -> None:
    """Nothing runs twice but what a replica was running when it died."""
    client, began_s = start(), time.monotonic()
    serve_work(client, journal)
    with submitter(client.redis_url, 2 * SUBMITTED) as (process, ids):
        wait_until(lambda: len(ids) >= SUBMITTED, 300)
        running = dict.fromkeys(replicas(client, "work").values())
        proxies = [one["pid"] for one in client.status()["proxies"].values() if one.get("pid")]
        process.kill()
        killed_ms = time.time() * 1000
        for pid in (*running, *proxies):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kill_controller()
        process.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))
    with handles.connect(client.redis_url) as connection, ThreadPoolExecutor(50) as pool:
        fetched = {name: pool.submit(connection.submitted(id_).result, 120) for name, id_ in ids.items()}
        assert {name: result.result() for name, result in fetched.items()} == {name: name for name in ids}
    starts = journal.starts()
    twice = {name for name, count in starts.items() if count > 1}
    in_progress = {name for name, started_ms in journal.started_ms() if started_ms > killed_ms - 5_000}
    table.add(
        Row(
            "all but Redis killed, submitted",
            time.monotonic() - began_s,
            len(ids),
            len(ids),
            twice=len(twice),
            notes="every result fetched",
        )
    )
    assert len(ids) >= SUBMITTED
    assert starts.keys() >= ids.keys()
    assert max(starts.values()) <= 2
    assert twice <= in_progress
    assert len(twice) <= 3 * 100, f"more than three replicas run at a time ({SERVICE_S} s each)"


@contextmanager
def submitter(url: str, count: int) -> Generator[tuple[subprocess.Popen[str], dict[str, str]], None, None]:
    """Start a process that submits ``count`` requests; yield it, and the ids by their names as they come."""
    command = [sys.executable, "-m", "tests.faults.load.submitter", url, str(count)]
    ids: dict[str, str] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as reader:
        output = process.stdout
        assert output is not None

        def read() -> None:
            for line in output:
                name, _, id_ = line.strip().partition(" ")
                if id_:
                    ids[name] = id_

        reading = reader.submit(read)
        try:
            yield process, ids
        finally:
            process.kill()
            reading.result(30)
