"""Time of a change of the registry until a proxy and its caller apply it, beside many endpoints. Without Ray.

Half of the routes have a parameter. The proxy, the caller and the measurement share one process, whose CPU time is
printed too: on a busy machine it varies less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.proxy.proxy import Proxy
from penstock.serve.instance import Instance

_PAUSE_S = 0.2
"""Between two changes, for what they leave to do."""


def endpoint(name: str, route: str | None) -> EndpointRecord:
    return EndpointRecord(name=name, route=route, traffic={"b": 1.0})


async def measure(url: str, endpoints: int, changes: int) -> dict[str, float]:
    core = await Instance(url, "default").open()
    names = [f"e{n}" for n in range(endpoints)]
    routed = {name: endpoint(name, f"/{name}/{{x}}" if n % 2 else f"/{name}") for n, name in enumerate(names)}
    await core.registry.change(lambda seen: Change({"b": BackendRecord(tag="b", version="1", code="")}, routed))
    proxy = Proxy(url, "default", "p", {"port": 0})
    await proxy.ready()
    await core.change(lambda seen: Change(endpoints={"first": endpoint("first", None)}))  # connects the caller
    live_ms: list[float] = []
    cpu_ms: list[float] = []
    for n in range(changes):
        added = endpoint(f"added-{n}", f"/added/{n}")
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        await core.change(lambda seen, added=added: Change(endpoints={added.name: added}))  # type: ignore[misc]
        live_ms.append((time.perf_counter() - began_s) * 1000)
        cpu_ms.append((time.process_time() - began_cpu_s) * 1000)
        await asyncio.sleep(_PAUSE_S)
    await proxy.drain(1.0)
    await core.close()
    return {"endpoints": endpoints, "live_ms": statistics.median(live_ms), "cpu_ms": statistics.median(cpu_ms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoints", type=int, default=3_000)
    parser.add_argument("--changes", type=int, default=7)
    asked = parser.parse_args()
    with EmbeddedServer.start() as server:
        print(json.dumps(asyncio.run(measure(server.url, asked.endpoints, asked.changes))), flush=True)


if __name__ == "__main__":
    main()
