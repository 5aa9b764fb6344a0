"""Three times what it can take, for callers that wait for a second."""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from penstock import serve
from penstock.broker.wire.keys import Keys
from tests.faults.conftest import Scale, StartClient
from tests.faults.load.backends import Blocking, Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.serve.backends import SMALL

# What each asserts is a share of what the machine can do, and beside others that would change from second to second.
pytestmark = pytest.mark.alone

SERVICE_S = 0.1
REPLICAS = 4
NOMINAL = REPLICAS / SERVICE_S
DEADLINE_S = 1.0
LATE_MS = 10.0
"""The clock is looked at in the line before the user's code, whose first line writes down when that is: it is later by
what the machine gave to somebody else in between. One in fifty may be later than that, none by a whole service time.
"""


@pytest.mark.parametrize("limit", [20, 10_000])
def test_replicas_stay_busy_with_timely_requests_under_overload(
    start: StartClient, journal: Journal, scale: Scale, table: Table, limit: int
) -> None:
    """Whether the limit of the queue or the deadline is what ends the waiting."""
    client = start()
    config = {"num_replicas": REPLICAS, "max_queued_requests": limit}
    client.create_backend("work", Blocking, journal.folder, SERVICE_S, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    stream, depth, for_s = Keys("default").requests("work"), 0, scale.for_s / 2
    capacity = capacity_of(client)
    load_at = traffic(client, rate=3 * NOMINAL, for_s=for_s, ways=("handle",), timeout_s=DEADLINE_S)
    with Redis.from_url(client.redis_url) as redis, load_at as load:
        while load.sending:
            depth = max(depth, int(redis.xlen(stream)))
            time.sleep(0.01)
    seen = load.outcomes
    starts_ms = {name: at_ms for name, at_ms in journal.started_ms() if name in load.sent_ms}
    late_ms = sorted(at_ms - load.sent_ms[name] - DEADLINE_S * 1000 for name, at_ms in starts_ms.items())
    # From the first start to the last: what came before and after is no overload.
    goodput = len(seen.answered) / ((max(starts_ms.values()) - min(starts_ms.values())) / 1000)
    notes = (
        f"{capacity:.0f}/s at capacity, goodput {goodput / capacity:.0%} of it; depth at most {depth}; "
        f"the last start {-late_ms[-1]:.0f} ms before its deadline"
    )
    table.add(Row.of(f"3x overload, limit {limit}", for_s, seen, notes=notes))
    assert seen.wrong == []
    assert seen.lost == 0
    assert set(seen.refused) <= {"Overloaded", "RequestTimeout"}
    assert depth <= limit
    assert late_ms[len(late_ms) * 49 // 50] <= LATE_MS
    assert late_ms[-1] <= SERVICE_S * 1000
    assert goodput >= scale.goodput * capacity


def capacity_of(client: serve.Client) -> float:
    """Return how many requests a second are answered while a few wait at any time."""
    handle, calls = client.get_handle("work"), 80

    def call(number: int) -> str:
        return str(handle.remote(f"before{number}").result(timeout=30))

    with ThreadPoolExecutor(8) as threads:
        began_s = time.monotonic()
        answers = list(threads.map(call, range(calls)))
    assert len(set(answers)) == calls
    return calls / (time.monotonic() - began_s)


def test_a_refusal_has_the_time_until_the_queue_is_drained(start: StartClient, journal: Journal) -> None:
    """Ten at half a second each, one at a time: five seconds, and before then as long as the oldest has been there."""
    client = start(http_options={"port": 0})
    config = {"max_queued_requests": 10}
    client.create_backend("work", Blocking, journal.folder, 0.5, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    told, numbers, began_s = list[tuple[float, float, int]](), itertools.count(), time.monotonic()

    def insist() -> None:
        with httpx.Client(timeout=30) as web:
            while (asked_s := time.monotonic() - began_s) < 9:
                response = web.post(f"{client.http_url}/job", json=f"r{next(numbers)}")
                if response.status_code == 503:
                    assert response.json()["error"]["type"] == "Overloaded"
                    told.append((asked_s, time.monotonic() - began_s, int(response.headers["retry-after"])))
                    time.sleep(0.1)
                else:
                    assert response.status_code == 200

    with ThreadPoolExecutor(14) as callers:
        for caller in [callers.submit(insist) for _ in range(14)]:
            caller.result()
    assert all(1 <= after_s <= max(1, math.ceil(told_s)) for _, told_s, after_s in told)
    # Seven seconds, as the first may have waited for the machine, and so may each of the ten.
    later = {after_s for asked_s, _, after_s in told if asked_s > 7}
    assert later
    assert later <= {5, 6, 7}
