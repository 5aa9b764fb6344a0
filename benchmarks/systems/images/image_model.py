"""The model of every system that classifies images: raw pixels in, a class and the sum of the pixels out.

A body is one byte, the index of its workload, and the pixels: uint8, height by width by three colours. The networks are
torchvision's, with random weights: on a GPU in bfloat16, else a small one in their place. Without PyTorch, or if
``--device simulated`` was asked for, a lock that is held for `SIMULATED_S` stands for the device.

A batch is copied into pinned memory and from there to the device in one go. Two threads may call at the same time: each
call has a buffer and a stream of its own.
"""

from __future__ import annotations

import importlib.util
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 64
SIDE = 224
"""Pixels to a side of what the networks see; smaller images are scaled up on the device."""
SIMULATED_S = 0.020
PADDED = 8
"""Batches are filled up to a multiple of this, so that few plans of cuDNN are needed."""
DEVICES = ("cuda", "cpu", "simulated")


@dataclass(frozen=True, slots=True)
class Workload:
    """One network and one size of images."""

    name: str
    network: str
    """The name of a constructor of ``torchvision.models``."""
    side: int

    @property
    def image_bytes(self) -> int:
        return self.side * self.side * 3


WORKLOADS = (
    Workload("ViT-L/16, 150 KB", "vit_l_16", SIDE),
    Workload("ResNet-50, 150 KB", "resnet50", SIDE),
    Workload("ResNet-50, 12 KB", "resnet50", 64),
)


def body(workload: Workload, seed: int) -> bytes:
    """Return a request: noise as an image."""
    pixels = np.random.default_rng(seed).integers(0, 256, workload.image_bytes, np.uint8)
    return bytes([WORKLOADS.index(workload)]) + pixels.tobytes()


def pixel_sum(request: bytes) -> int:
    return sum(request) - request[0]


def find_device() -> str:
    """Return the device that there is: ``cuda``, ``cpu`` with PyTorch, or ``simulated``."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        return "simulated"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Model:
    """Classifies batches. Each call appends a line to a file in the scratch folder: size, seconds, of which staging.

    Args:
        device: one of `DEVICES`.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._networks: dict[str, Any] = {}
        self._staging: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        self._simulated = threading.Lock()
        self._warm = threading.local()
        self._calls = Path(tempfile.gettempdir()) / "model-calls"
        if device == "simulated":
            for _ in range(2):
                self._staging.put(_Staging(np.empty(BATCH_SIZE * SIDE * SIDE * 3, np.uint8)))
            return
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        self._torch: Any = torch
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        for name in dict.fromkeys(workload.network for workload in WORKLOADS):
            self._networks[name] = self._network(name)
        for _ in range(2):
            pinned = torch.empty(BATCH_SIZE * SIDE * SIDE * 3, dtype=torch.uint8, pin_memory=device == "cuda")
            stream = torch.cuda.Stream() if device == "cuda" else None
            self._staging.put(_Staging(pinned.numpy(), pinned, stream))
        self.warm_up()

    @property
    def shown_device(self) -> str:
        if self.device == "cuda":
            return str(self._torch.cuda.get_device_name(0))
        small = "the processor, with one thread and a small network"
        return small if self.device == "cpu" else f"simulated: a lock held for {1000 * SIMULATED_S:g} ms per batch"

    def warm_up(self) -> None:
        """Run each size of batch once: cuDNN keeps its plans by thread, so each thread that calls does this first."""
        self._warm.done = True
        if self.device == "simulated":
            return
        sizes = range(PADDED, BATCH_SIZE + 1, PADDED) if self.device == "cuda" else (BATCH_SIZE,)
        for workload in WORKLOADS:
            one = body(workload, 0)
            for size in sizes:
                self._classify([one] * size)

    def answers(self, bodies: Sequence[Any]) -> list[dict[str, int]]:
        """Classify the bodies of a batch, which may belong to several workloads."""
        if not getattr(self._warm, "done", False):
            self.warm_up()
        if any(one[0] != bodies[0][0] for one in bodies):
            return [self.answers([one])[0] for one in bodies]
        began_s = time.perf_counter()
        found, staging_s = self._classify(bodies)
        with self._calls.open("a") as calls:
            calls.write(f"{len(bodies)} {time.perf_counter() - began_s} {staging_s}\n")
        return found

    def repeat(self, workload: Workload, bodies: Sequence[bytes], seconds: float) -> float:
        """Copy one staged batch to the device and classify it, again and again; return images per second."""
        with self._borrowed() as staging:
            staging.fill(bodies, workload)
            for _ in range(3):
                self._run(staging, len(bodies), workload)
            began_s, calls = time.perf_counter(), 0
            while (took_s := time.perf_counter() - began_s) < seconds:
                self._run(staging, len(bodies), workload)
                calls += 1
        return calls * len(bodies) / took_s

    def _borrowed(self) -> _Borrowed:
        return _Borrowed(self._staging)

    def _classify(self, bodies: Sequence[Any]) -> tuple[list[dict[str, int]], float]:
        workload = WORKLOADS[bodies[0][0]]
        with self._borrowed() as staging:
            began_s = time.perf_counter()
            staging.fill(bodies, workload)
            staging_s = time.perf_counter() - began_s
            classes, sums = self._run(staging, len(bodies), workload)
        return [{"class": classes[n], "sum": sums[n]} for n in range(len(bodies))], staging_s

    def _run(self, staging: _Staging, count: int, workload: Workload) -> tuple[list[int], list[int]]:
        """Return classes and sums of the staged images, when the device has computed them."""
        if self.device == "simulated":
            with self._simulated:
                time.sleep(SIMULATED_S)
            images = staging.pixels[: count * workload.image_bytes].reshape(count, -1)
            sums = [int(one) for one in images.sum(1, dtype=np.int64)]
            return [one % 1000 for one in sums], sums
        padded = -(-count // PADDED) * PADDED
        host = staging.tensor[: padded * workload.image_bytes].view(padded, workload.side, workload.side, 3)
        torch = self._torch
        with torch.inference_mode():
            if staging.stream is None:
                classes, sums = self._forward(host, workload).tolist()
            else:
                with torch.cuda.stream(staging.stream):
                    found = self._forward(host.to("cuda", non_blocking=True), workload)
                    classes, sums = found.tolist()  # waits for the stream
        return classes, sums

    def _forward(self, images: Any, workload: Workload) -> Any:
        """Classes and sums of images on the device, as one tensor there."""
        torch = self._torch
        inputs = images.permute(0, 3, 1, 2).to(self._dtype)
        if workload.side != SIDE:
            inputs = torch.nn.functional.interpolate(inputs, size=SIDE, mode="bilinear")
        classes = self._networks[workload.network]((inputs - 118.0) / 58.0).argmax(1)
        return torch.stack((classes, images.flatten(1).sum(1, dtype=torch.int64)))

    def _network(self, name: str) -> Any:
        torch = self._torch
        if self.device == "cpu":
            return torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(147, 1000)).eval()
        import torchvision

        with torch.device("cuda"):
            network = getattr(torchvision.models, name)(weights=None)
        return network.eval().to(dtype=self._dtype, memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class _Staging:
    """Memory for the pixels of a batch, pinned where there is a GPU, and the stream that copies it."""

    pixels: Any
    """A numpy view of the memory."""
    tensor: Any = None
    stream: Any = None

    def fill(self, bodies: Sequence[Any], workload: Workload) -> None:
        size = workload.image_bytes
        for n, one in enumerate(bodies):
            self.pixels[n * size : (n + 1) * size] = np.frombuffer(one, np.uint8, size, 1)


class _Borrowed:
    def __init__(self, free: queue.SimpleQueue[_Staging]) -> None:
        self._free = free

    def __enter__(self) -> _Staging:
        self._staging = self._free.get()
        return self._staging

    def __exit__(self, *_: object) -> None:
        self._free.put(self._staging)
