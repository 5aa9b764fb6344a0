"""LitServe as its documentation starts it: one API server, as many inference workers as replicas."""

from __future__ import annotations

import time
from typing import Any

import litserve
from program import BATCH_WAIT_S, MAX_BATCH_SIZE, NOOP_ANSWER, SLEEP_S, Job, SleepingModel, parse


class Noop(litserve.LitAPI):
    def setup(self, device: str) -> None:
        """Nothing to load."""

    def predict(self, x: Any) -> Any:
        return NOOP_ANSWER


class Sleep(Noop):
    def predict(self, x: Any) -> Any:
        time.sleep(SLEEP_S)
        return NOOP_ANSWER


class Echo(Noop):
    """LitServe hands the decoded JSON value over: the echo is that of a JSON string."""

    def predict(self, x: Any) -> Any:
        return x


class Digits(litserve.LitAPI):
    def setup(self, device: str) -> None:
        from digit_model import Model

        self._digits = Model()

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[Any]) -> list[Any]:
        return self._digits.answers(x)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output


class SleepBatch(litserve.LitAPI):
    def __init__(self, call_s: float, **options: Any) -> None:
        super().__init__(**options)
        self._call_s = call_s

    def setup(self, device: str) -> None:
        self._sleeping = SleepingModel(self._call_s)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[Any]) -> list[Any]:
        return self._sleeping.answers(len(x))

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output


APIS: dict[str, type[litserve.LitAPI]] = {"noop": Noop, "sleep": Sleep, "echo": Echo, "digits": Digits}


def main(job: Job) -> None:
    """Serve at LitServe's own route, ``/predict``; it has no GET."""
    batching: dict[str, Any] = (
        {"max_batch_size": MAX_BATCH_SIZE, "batch_timeout": BATCH_WAIT_S} if job.takes_batches else {}
    )
    api = SleepBatch(job.batch_call_s, **batching) if job.batch_call_s else APIS[job.workload](**batching)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=job.replicas)
    server.run(
        host="127.0.0.1",
        port=job.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main(parse())
