"""Ray Serve's own handle, called from a driver: asyncio, and threads that wait for one answer at a time."""

from __future__ import annotations

import asyncio

import ray
from items import add_one, at_once, by_threads, measure, parse
from ray import serve


class AddOne:
    async def __call__(self, number: int) -> int:
        return add_one(number)


def main(items: int) -> None:
    """Without HTTP: ``proxy_location`` is disabled."""
    ray.init(include_dashboard=False, num_cpus=3, _node_ip_address="127.0.0.1")
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(max_ongoing_requests=2_000)(AddOne)
    handle = serve.run(deployment.bind(), route_prefix=None)

    async def call(number: int) -> object:
        return await handle.remote(number)

    measure("asyncio, 1,000 in flight", items, lambda count: asyncio.run(at_once(count, 1_000, call)))
    measure(
        "sync, 16 threads, one at a time",
        items,
        lambda count: by_threads(count, 16, lambda number: handle.remote(number).result()),
    )
    ray.shutdown()


if __name__ == "__main__":
    main(parse())
