"""Penstock from nothing to the first answer, step by step, and the memory of its processes beside a bare Ray actor."""

from __future__ import annotations

import logging
from typing import Any

from startup import Clock, first_answer, print_memory


def noop(request: Any) -> Any:
    return {"ok": True}


def main() -> None:
    """Start, serve two backends, and measure."""
    clock = Clock()
    import ray

    clock.step("import ray")
    from penstock import serve

    _ = serve.start  # it is loaded by the first use of it
    clock.step("import penstock.serve")
    # As serve.start does, so that its own share is seen.
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    clock.step("ray.init")
    client = serve.start(http_options={"port": 0})
    clock.step("serve.start")
    client.create_backend("first", noop, ray_actor_options={"num_cpus": 0})
    clock.step("create_backend")
    client.create_endpoint("first", backend="first", route="/")
    clock.step("create_endpoint")
    first_answer(str(client.http_url))
    clock.step("first answer")
    client.create_backend("second", noop, ray_actor_options={"num_cpus": 0})
    clock.step("a second create_backend")
    client.update_backend_config("second", {"num_replicas": 2})
    clock.step("a second replica")

    print_memory(
        clock,
        {
            "HTTPProxy": "proxy",
            "ReplicaActor": "replica",
            "ControllerActor": "controller",
            "valkey-server": "broker",
        },
    )
    client.shutdown()
    clock.step("shutdown")
    ray.shutdown()


if __name__ == "__main__":
    main()
