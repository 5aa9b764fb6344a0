"""`Batch.progress`: what a batch waits for, asked from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from penstock.handles import Batch
from penstock.handles.batch.progress import BatchProgress
from penstock.handles.connection import Connection
from tests.handles.site import Site, echo
from tests.support.waiting import wait_until


@contextmanager
def iterated(batch: Batch) -> Generator[list[Any], None, None]:
    """Iterate over a batch in a thread, until it is over; gives the list that its results are added to."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(result.get() for result in batch))
    thread.start()
    yield results
    thread.join(60)
    assert not thread.is_alive()


def seen(batch: Batch, condition: Callable[[BatchProgress], bool]) -> BatchProgress:
    """Wait until the progress of a batch meets a condition, and return it."""
    found: list[BatchProgress] = []

    def look() -> bool:
        progress = batch.progress()
        if progress is not None and condition(progress):
            found.append(progress)
        return bool(found)

    wait_until(look, timeout_s=30)
    return found[0]


def test_a_batch_without_replicas_waits_for_them(site: Site, connected: Connection) -> None:
    site.declare()
    batch = connected.batch("ask").as_completed([1, 2, 3])
    assert batch.progress() is None
    with iterated(batch) as results:
        assert seen(batch, lambda progress: progress.waits_for == "replicas").in_flight == 3
        site.serve(echo)
    assert sorted(results) == [1, 2, 3]
    assert batch.progress() is None


def test_a_batch_whose_queue_is_full_waits_for_room_and_counts_what_is_sent_again(
    site: Site, connected: Connection
) -> None:
    opened = threading.Event()

    def wait(request: Any) -> Any:
        opened.wait(60)
        return request.data

    site.serve(wait, max_queued_requests=10)
    batch = connected.batch("ask", window=100).as_completed(range(100))
    with iterated(batch) as results:
        progress = seen(batch, lambda progress: progress.waits_for == "queue" and progress.retried > 0)
        assert progress.in_flight > 10
        opened.set()
    assert sorted(results) == list(range(100))


def test_a_slow_backend_is_nothing_that_a_batch_waits_for(site: Site, connected: Connection) -> None:
    opened = threading.Event()

    def wait(request: Any) -> Any:
        opened.wait(60)
        return request.data

    site.serve(wait)
    batch = connected.batch("ask").as_completed([1])
    with iterated(batch) as results:
        since: list[float] = []

        def has_looked_for_replicas() -> bool:
            progress = batch.progress()
            assert progress is None or (progress.waits_for is None and progress.retried == 0)
            since.append(0.0)
            return len(since) > 60

        wait_until(has_looked_for_replicas, timeout_s=30)
        opened.set()
    assert results == [1]
