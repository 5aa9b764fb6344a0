"""Mosec: an HTTP front in Rust, Python workers behind it over Unix sockets."""

from __future__ import annotations

import os
import time
from typing import Any

from program import BATCH_WAIT_S, MAX_BATCH_SIZE, NOOP_ANSWER, SLEEP_S, Job, SleepingModel, parse

JOB = parse() if __name__ == "__main__" else Job(0, "noop", 1)

CALL_S = "MOSEC_BENCH_CALL_S"
"""Tells the workers, which Mosec starts as processes of their own, how long to sleep for a batch."""
os.environ.setdefault(CALL_S, str(JOB.batch_call_s))

# Mosec reads these when it is imported.
os.environ.update(
    MOSEC_ADDRESS="127.0.0.1",
    MOSEC_PORT=str(JOB.port),
    MOSEC_LOG_LEVEL="warning",
    MOSEC_MAX_REQUEST_SIZE=str(64 * 1024 * 1024),
)

from mosec import Server, Worker  # noqa: E402


class Noop(Worker):
    """Mosec's own JSON in and out."""

    def forward(self, data: Any) -> Any:
        return NOOP_ANSWER


class Sleep(Worker):
    def forward(self, data: Any) -> Any:
        time.sleep(SLEEP_S)
        return NOOP_ANSWER


class Echo(Worker):
    """Bytes in, the same bytes out, no codec between."""

    resp_mime_type = "application/octet-stream"

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: Any) -> Any:
        return data


class Digits(Worker):
    def __init__(self) -> None:
        from digit_model import Model

        self._model = Model()

    def forward(self, data: list[Any]) -> list[Any]:
        return self._model.answers(data)


class SleepBatch(Worker):
    def __init__(self) -> None:
        self._model = SleepingModel(float(os.environ[CALL_S]))

    def forward(self, data: list[Any]) -> list[Any]:
        return self._model.answers(len(data))


WORKERS: dict[str, type[Worker]] = {"noop": Noop, "sleep": Sleep, "echo": Echo, "digits": Digits}


def main(job: Job) -> None:
    """Serve at Mosec's own route, ``/inference``."""
    server = Server()
    batching = (
        {"max_batch_size": MAX_BATCH_SIZE, "max_wait_time": round(BATCH_WAIT_S * 1000)} if job.takes_batches else {}
    )
    server.append_worker(SleepBatch if job.batch_call_s else WORKERS[job.workload], num=job.replicas, **batching)
    server.run()


if __name__ == "__main__":
    main(JOB)
