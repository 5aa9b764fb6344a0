"""Penstock with the model of images on one replica: batches of up to 64, everything else at its default."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from image_job import ImageJob, parse
from image_model import BATCH_SIZE, Model
from program import run_until_ended

from penstock import serve

ENDPOINT = "images"


class Images:
    def __init__(self, device: str) -> None:
        self.model = Model(device)

    @serve.accept_batch
    def __call__(self, requests: list[Any]) -> list[Any]:
        return self.model.answers([request.data for request in requests])


def main(job: ImageJob) -> None:
    """Serve at ``/``. The broker's URL is left in the scratch folder."""
    # Where Ray does not find the GPU that PyTorch sees, the replica still may use it.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    with serve.start(http_options={"port": job.port, "proxies_per_node": job.proxies}) as client:
        import ray

        (Path(tempfile.gettempdir()) / "redis-url").write_text(client.redis_url)
        client.create_backend(
            ENDPOINT,
            Images,
            job.device,
            config={"max_batch_size": BATCH_SIZE},
            ray_actor_options={"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 0},
        )
        client.create_endpoint(ENDPOINT, backend=ENDPOINT, route="/", methods=["POST"])
        run_until_ended()


if __name__ == "__main__":
    main(parse())
