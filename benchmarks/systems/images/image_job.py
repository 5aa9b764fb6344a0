"""Command line of the programs that serve `image_model.Model`: a port and a device."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from image_model import DEVICES

# Where programs find what they share with the servers of other workloads.
sys.path.append(str(Path(__file__).resolve().parents[1] / "http"))


@dataclass(frozen=True, slots=True)
class ImageJob:
    """The model to serve, on this device and at this port."""

    port: int
    device: str
    proxies: int
    """HTTP servers, where their number can be chosen."""


def parse() -> ImageJob:
    """Read the job, and leave nothing in ``sys.argv`` for systems that read it too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--proxies", type=int, default=1)
    asked = parser.parse_args()
    del sys.argv[1:]
    return ImageJob(asked.port, asked.device, asked.proxies)
