"""Mosec with the model of images on one worker: batches of up to 64, which it fills up for at least 1 ms."""

from __future__ import annotations

import os
from typing import Any

from image_job import ImageJob, parse
from image_model import BATCH_SIZE, Model
from program import BATCH_WAIT_S

DEVICE = "MOSEC_BENCH_DEVICE"
"""Names the device to the worker, which Mosec starts as a process of its own."""

JOB = parse() if __name__ == "__main__" else ImageJob(0, os.environ[DEVICE], 1)
os.environ[DEVICE] = JOB.device

# Mosec reads these when it is imported.
os.environ.update(
    MOSEC_ADDRESS="127.0.0.1",
    MOSEC_PORT=str(JOB.port),
    MOSEC_LOG_LEVEL="warning",
    MOSEC_MAX_REQUEST_SIZE=str(64 * 1024 * 1024),
)

from mosec import Server, Worker  # noqa: E402


class Images(Worker):
    def __init__(self) -> None:
        self._model = Model(os.environ[DEVICE])

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[Any]:
        return self._model.answers(data)


def main() -> None:
    """Serve at Mosec's own route, ``/inference``."""
    server = Server()
    server.append_worker(Images, num=1, max_batch_size=BATCH_SIZE, max_wait_time=round(BATCH_WAIT_S * 1000), timeout=60)
    server.run()


if __name__ == "__main__":
    main()
