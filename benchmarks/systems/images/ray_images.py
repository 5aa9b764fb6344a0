"""Ray Serve with the model of images on one replica: batches of up to 64, HAProxy if the environment asks for it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from image_job import ImageJob, parse
from image_model import BATCH_SIZE, Model
from program import BATCH_WAIT_S, run_until_ended
from ray_serve import MAX_ONGOING_REQUESTS, keep_haproxy_to_itself


def main(job: ImageJob) -> None:
    """Serve at ``/``."""
    keep_haproxy_to_itself(Path(tempfile.gettempdir()))
    import ray
    from ray import serve
    from starlette.requests import Request

    class Images:
        def __init__(self, device: str) -> None:
            self.model = Model(device)

        @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
        async def answers(self, bodies: list[bytes]) -> list[Any]:
            # On a thread, so that the replica goes on collecting requests meanwhile.
            return await asyncio.to_thread(self.model.answers, bodies)

        async def __call__(self, request: Request) -> Any:
            return await self.answers(await request.body())

    gpus = 1 if job.device == "cuda" else 0
    ray.init(include_dashboard=False, num_cpus=3, num_gpus=gpus, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": job.port})
    deployment = serve.deployment(
        num_replicas=1, max_ongoing_requests=MAX_ONGOING_REQUESTS, ray_actor_options={"num_cpus": 1, "num_gpus": gpus}
    )(Images)
    serve.run(deployment.bind(job.device), route_prefix="/")
    run_until_ended()


if __name__ == "__main__":
    main(parse())
