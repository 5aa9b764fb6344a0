"""Simulation: the worth of running a request where its model is loaded. Prints the table of a decision.

    python benchmarks/model_affinity.py

Requests arrive at random and name models by Zipf's law. Each replica runs one request at a time and holds the models
that it used last. `any` is one queue for all replicas, `idle` the same with the choice of a replica that has the model
among those that are idle, and `own` a queue for each replica, chosen by the model.
"""

from __future__ import annotations

import random
import zlib
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from statistics import mean, quantiles

REPLICAS, RUN_S, REQUESTS = 4, 0.010, 40_000


class Replica:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.models: OrderedDict[int, None] = OrderedDict()

    def use(self, model: int) -> bool:
        """Return whether the model has to be loaded."""
        is_missing = model not in self.models
        if is_missing and len(self.models) >= self.capacity:
            self.models.popitem(last=False)
        self.models[model] = None
        self.models.move_to_end(model)
        return is_missing


def simulate(policy: str, models: int, capacity: int, load_s: float, busy: float) -> tuple[float, float, float]:
    """Return loads per 100 requests, and the mean and the 99th percentile of the latency in milliseconds."""
    choose = random.Random(7)
    weights = [1 / rank for rank in range(1, models + 1)]
    replicas = [Replica(capacity) for _ in range(REPLICAS)]
    free = [(0.0, n) for n in range(REPLICAS)]
    heapify(free)
    now, loads, latencies = 0.0, 0, list[float]()
    for model in choose.choices(range(models), weights, k=REQUESTS):
        now += choose.expovariate(busy * REPLICAS / RUN_S)
        if policy == "own":
            wanted = zlib.crc32(b"%d" % model) % REPLICAS
            at_s = next(at_s for at_s, n in free if n == wanted)
            free.remove((at_s, wanted))
            heapify(free)
            n = wanted
        else:
            idle = [(at_s, n) for at_s, n in free if at_s <= now]
            having = [one for one in idle if model in replicas[one[1]].models]
            if policy == "idle" and having:
                at_s, n = having[0]
                free.remove((at_s, n))
                heapify(free)
            elif idle:
                at_s, n = choose.choice(idle)
                free.remove((at_s, n))
                heapify(free)
            else:
                at_s, n = heappop(free)
        must_load = replicas[n].use(model)
        loads += must_load
        end_s = max(now, at_s) + RUN_S + (load_s if must_load else 0.0)
        latencies.append(1000 * (end_s - now))
        heappush(free, (end_s, n))
    return 100 * loads / REQUESTS, mean(latencies), quantiles(latencies, n=100)[98]


def main() -> None:
    print(f"{REPLICAS} replicas, runs of {1000 * RUN_S:g} ms")
    print("models, held, load, busy | loads per 100: any, idle, own | p99 ms: any, idle, own")
    for models, capacity, load_s, busy in (
        (4, 3, 0.1, 0.3),
        (12, 3, 0.1, 0.1),
        (12, 3, 0.02, 0.3),
        (12, 6, 0.1, 0.3),
        (12, 6, 1.0, 0.02),
        (100, 10, 0.1, 0.05),
    ):
        rows = [simulate(policy, models, capacity, load_s, busy) for policy in ("any", "idle", "own")]
        loads = ", ".join(f"{row[0]:.1f}" for row in rows)
        p99 = ", ".join(f"{row[2]:,.0f}" for row in rows)
        print(f"{models}, {capacity}, {1000 * load_s:g} ms, {busy:.0%} | {loads} | {p99}")


if __name__ == "__main__":
    main()
