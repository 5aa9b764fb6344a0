"""Serve a classifier of handwritten digits, and ask it over HTTP, through a sync handle and through an asyncio handle.

The data is scikit-learn's bundled digits; the model is trained in the backend's constructor; two replicas answer in
batches.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from penstock import serve


def digits() -> Any:
    """Return (images to train on, images to test with, labels to train on, labels to test with)."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images, labels, test_size=0.5, random_state=0, stratify=labels)


class Digits:
    """Tells which digit an image of 8 x 8 pixels shows."""

    def __init__(self) -> None:
        images, _, labels, _ = digits()
        self.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(images, labels)

    @serve.accept_batch
    def __call__(self, requests: list[serve.Request]) -> list[dict[str, int]]:
        found = self.model.predict(np.array(self.images(requests)))
        return [{"digit": int(digit), "batch": len(requests)} for digit in found]

    def images(self, requests: list[serve.Request]) -> list[list[float]]:
        return [request.data for request in requests]


def over_http(url: str, images: list[list[float]]) -> list[dict[str, int]]:
    with httpx.Client(limits=httpx.Limits(max_connections=16)) as http, ThreadPoolExecutor(16) as threads:

        def ask(image: list[float]) -> dict[str, int]:
            response = http.post(f"{url}/digit", json=image)
            return response.raise_for_status().json()

        return list(threads.map(ask, images))


def through_a_handle(handle: serve.ServeHandle, images: list[list[float]]) -> list[dict[str, int]]:
    futures = [handle.remote(image) for image in images]
    return [future.result(timeout=60) for future in futures]


async def through_an_asyncio_handle(client: serve.Client, images: list[list[float]]) -> list[dict[str, int]]:
    handle = client.get_handle("digit", sync=False)
    futures = [await handle.remote(image) for image in images]
    return await asyncio.gather(*futures)


def main() -> None:
    _, images, _, labels = digits()
    images = images.tolist()
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("digits", Digits, config={"num_replicas": 2, "max_batch_size": 32})
        client.create_endpoint("digit", backend="digits", route="/digit", methods=["POST"])
        print(f"{len(images)} images, 2 replicas, batches of up to 32")
        for way, ask in {
            "HTTP": lambda: over_http(str(client.http_url), images),
            "sync handle": lambda: through_a_handle(client.get_handle("digit"), images),
            "asyncio handle": lambda: asyncio.run(through_an_asyncio_handle(client, images)),
        }.items():
            start = time.perf_counter()
            answers = ask()
            took_s = time.perf_counter() - start
            accuracy = np.mean([answer["digit"] == label for answer, label in zip(answers, labels, strict=True)])
            largest = max(answer["batch"] for answer in answers)
            rate = len(images) / took_s
            print(f"{way:>14}: accuracy {accuracy:.4f}, {rate:5.0f} requests/s, largest batch {largest}")


if __name__ == "__main__":
    main()
