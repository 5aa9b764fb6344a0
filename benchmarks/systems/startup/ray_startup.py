"""Ray Serve from nothing to the first answer, step by step, and the memory of its processes beside a bare Ray actor."""

from __future__ import annotations

import socket
from typing import Any

from startup import Clock, first_answer, print_memory


def main() -> None:
    """Start, serve two applications, and measure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    clock = Clock()
    import ray

    clock.step("import ray")
    from ray import serve

    clock.step("import ray.serve")

    async def noop(request: Any) -> Any:
        return {"ok": True}

    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1")
    clock.step("ray.init")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    clock.step("serve.start")
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0})(noop)
    serve.run(deployment.bind(), name="first", route_prefix="/")
    clock.step("serve.run")
    first_answer(f"http://127.0.0.1:{port}/")
    clock.step("first answer")
    serve.run(deployment.bind(), name="second", route_prefix="/second")
    clock.step("a second serve.run")

    print_memory(
        clock,
        {
            "ProxyActor": "proxy",
            "ServeReplica": "replica",
            "ServeController": "controller",
        },
    )
    serve.shutdown()
    clock.step("shutdown")
    ray.shutdown()


if __name__ == "__main__":
    main()
