"""Classify images in batches, each of which is copied to the GPU in one go. One is prepared while another is computed.

Without a GPU it runs on the processor. Needs PyTorch: ``pip install torch torchvision``. The network has random
weights, so the classes mean nothing.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import time
from typing import Any

import httpx
import numpy as np

from penstock import serve

try:
    import torch
    import torchvision
except ImportError as e:
    sys.exit(f"this example needs PyTorch: pip install torch torchvision ({e})")

SIDE = 64
IMAGE_BYTES = SIDE * SIDE * 3
BATCH_SIZE = 32
AT_A_TIME = 2
"""Batches in the code at a time: one is prepared while the GPU computes the other."""


class Images:
    """Takes pixels as bytes, height by width by three colours."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = torchvision.models.resnet18(weights=None).eval().to(self.device)
        # The GPU reads pinned memory by itself, so the thread does not wait for the copy. Two batches must not share a
        # buffer: a client would get the result for the image of another.
        self.buffers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(AT_A_TIME):
            self.buffers.put(
                torch.empty(BATCH_SIZE, IMAGE_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            )
        # The first batch loads kernels, and compiles where torch.compile is used. No request shall wait for that.
        self.classify([bytes(IMAGE_BYTES)] * BATCH_SIZE)

    @serve.accept_batch
    def __call__(self, requests: list[serve.Request]) -> list[Any]:
        answers: list[Any] = [
            None
            if len(request.data) == IMAGE_BYTES
            else serve.errors.MalformedBody(f"not {IMAGE_BYTES} bytes of pixels")
            for request in requests
        ]
        valid = [n for n, answer in enumerate(answers) if answer is None]
        for n, found in zip(valid, self.classify([requests[n].data for n in valid]), strict=True):
            answers[n] = {"class": found, "device": self.device.type, "batch": len(requests)}
        return answers

    def classify(self, images: list[bytes]) -> list[int]:
        if not images:
            return []
        buffer = self.buffers.get()
        try:
            pixels = buffer.numpy()
            for n, image in enumerate(images):
                pixels[n] = np.frombuffer(image, np.uint8)
            with torch.inference_mode():
                batch = buffer[: len(images)].to(self.device, non_blocking=True).view(-1, SIDE, SIDE, 3)
                scores = self.network(batch.permute(0, 3, 1, 2) / 255)
                return scores.argmax(1).tolist()  # one copy back, which waits for the GPU
        finally:
            self.buffers.put(buffer)


async def classify_all(client: serve.Client, images: list[bytes]) -> list[dict[str, Any]]:
    handle = client.get_handle("classify", sync=False)
    futures = [await handle.remote(image) for image in images]
    return await asyncio.gather(*futures)


def main(count: int) -> None:
    images = [np.random.default_rng(seed).bytes(IMAGE_BYTES) for seed in range(count)]
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend(
            "images",
            Images,
            config={"max_batch_size": BATCH_SIZE, "max_concurrent_queries": AT_A_TIME},
            ray_actor_options={"num_gpus": 1} if torch.cuda.is_available() else {},
        )
        client.create_endpoint("classify", backend="images", route="/classify", methods=["POST"])
        start = time.perf_counter()
        answers = asyncio.run(classify_all(client, images))
        rate = count / (time.perf_counter() - start)
        largest = max(answer["batch"] for answer in answers)
        print(f"{count} images on {answers[0]['device']}: {rate:.0f} images/s, largest batch {largest}")
        for image in (images[0], b"no image"):
            response = httpx.post(f"{client.http_url}/classify", content=image, timeout=60)
            print(f"over HTTP: {response.status_code}, {response.text}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
