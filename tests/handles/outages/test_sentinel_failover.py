"""Failovers by sentinels under load: callers that live lose nothing, and work continues soon after the election."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import pytest

from penstock import handles
from penstock.handles.errors import BrokerUnavailable
from tests.handles.site import INSTANCE, Site, echo
from tests.support.redis_servers import Watched, watched
from tests.support.waiting import wait_until

RECOVERED_S = 5.0
BUSY_S = 5.0
"""What other programs of the machine may add to that."""
WINDOW = 50
PAUSE_S = 0.05
"""After each turn, so that the load leaves the machine to the servers that elect."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path, replicas=1) as servers:
        yield servers


class Load:
    """A thread that keeps `WINDOW` calls in flight, and counts what became of them."""

    def __init__(self, url: str) -> None:
        self.sent = self.answered = self.refused = 0
        self.wrong: list[object] = []
        self.answered_at_s = 0.0
        self._url = url
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        with handles.connect(self._url, INSTANCE) as connection:
            handle = connection.get_handle("ask")
            calls: dict[Future[Any], int] = {}
            while calls or not self._ending.is_set():
                while len(calls) < WINDOW and not self._ending.is_set():
                    calls[handle.remote(self.sent)] = self.sent
                    self.sent += 1
                done, _ = wait(calls, timeout=60, return_when=FIRST_COMPLETED)
                if not done:
                    self.wrong.append(f"{len(calls)} calls without an outcome")
                    return
                for call in done:
                    self._count(call, calls.pop(call))
                self._ending.wait(PAUSE_S)

    def _count(self, call: Future[Any], expected: int) -> None:
        try:
            answer = call.result()
        except BrokerUnavailable:
            self.refused += 1
            time.sleep(0.01)
        except Exception as e:
            self.wrong.append(e)
        else:
            if answer != expected:
                self.wrong.append(answer)
            self.answered += 1
            self.answered_at_s = time.monotonic()


@pytest.mark.parametrize("fail_over", [Watched.fail_over, Watched.kill_primary], ids=["planned", "the primary killed"])
def test_a_failover_under_load_loses_nothing(service: Watched, fail_over: Callable[[Watched], None]) -> None:
    site = Site(service.url)
    runs: Counter[Any] = Counter()

    def count(request: Any) -> Any:
        runs[request.data] += 1
        return request.data

    try:
        site.serve(count, max_concurrent_queries=20)
        with Load(service.url) as load:
            wait_until(lambda: load.answered > 500)
            old = service.primary
            fail_over(service)
            elected_at_s = time.monotonic()
            wait_until(lambda: not old.clients())  # an old primary that is well goes on answering
            moved_at_s = time.monotonic()
            wait_until(lambda: load.answered_at_s > moved_at_s)
            recovered_s = time.monotonic() - elected_at_s
            reached = load.answered
            wait_until(lambda: load.answered > reached + 500)
    finally:
        site.close()
    print(f"{load.sent} sent, {load.answered} answered, {load.refused} refused, recovered in {recovered_s:.2f} s")
    assert load.wrong == []
    assert load.sent == load.answered + load.refused
    assert recovered_s < RECOVERED_S + BUSY_S


def test_a_submitted_request_survives_the_primary(service: Watched) -> None:
    """The primary confirmed it with its replica in reach: `min-replicas-to-write` is not needed for one that waits."""
    site = Site(service.url)
    try:
        site.declare()
        with handles.connect(service.url, INSTANCE) as connection:
            submitted = connection.get_handle("ask").submit("x")
            with service.primary.client() as redis:
                assert redis.wait(1, 10_000) == 1
            service.kill_primary()
            wait_until(lambda: _is_reached(lambda: site.serve(echo)))
            wait_until(lambda: _is_reached(lambda: submitted.result(timeout=30)))
            assert submitted.result(timeout=30) == "x"
    finally:
        site.close()


def _is_reached(call: Callable[[], object]) -> bool:
    """Make a call; return whether it reached the broker. An election may take longer than a command waits for it."""
    try:
        call()
    except BrokerUnavailable:
        return False
    return True
