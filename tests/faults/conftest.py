from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from tests.faults.load.backends import Journal
from tests.faults.load.table import TABLE, Table

ASKED = os.environ.get("PENSTOCK_TEST_FAULTS", "")
"""``full`` (``make faults``): for as long as the promises are made for. A number: for so many seconds of the same.
Nothing (``make test``): for a glance at each.
"""

StartClient = Callable[..., serve.Client]


@dataclass(frozen=True)
class Scale:
    """The amount of each fault."""

    rate: float
    """Requests a second."""
    for_s: float
    every_s: float
    """From one fault to the next."""
    garbage: int
    """Examples of each kind of it."""
    soak_s: float
    goodput: float
    """The least under overload, as a share of the capacity. In seconds, what else the machine does weighs more."""
    take_over_s: float
    """By when what a dead replica held has been answered by another, what else the machine does included."""


SHORT = Scale(rate=100, for_s=8, every_s=3, garbage=60, soak_s=8, goodput=0.8, take_over_s=6.0)
WHOLE = Scale(rate=200, for_s=300, every_s=5, garbage=2_000, soak_s=600, goodput=0.9, take_over_s=3.0)


@pytest.fixture(scope="session")
def scale() -> Scale:
    if ASKED.isdigit():
        return replace(WHOLE, for_s=float(ASKED), soak_s=float(ASKED))
    return WHOLE if ASKED == "full" else SHORT


@pytest.fixture
def table() -> Table:
    return TABLE


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    folder = tmp_path / "journal"
    folder.mkdir()
    return Journal(folder)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be hurt. What it has answered is in its append-only file."""
    with EmbeddedServer.start(data_dir=tmp_path / "broker") as server:
        yield server


@pytest.fixture
def start(cluster: str, broker: EmbeddedServer) -> Iterator[StartClient]:
    """Start instances, by default one with two HTTP servers on one port, that end with the test."""
    with ExitStack() as started:

        def start(**options: Any) -> serve.Client:
            defaults: dict[str, Any] = {"redis_url": broker.url, "http_options": {"port": 0, "proxies_per_node": 2}}
            client = serve.start(**{**defaults, **options})
            started.callback(client.shutdown)
            return client

        yield start


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A server of the test's own that keeps nothing, to be hurt."""
    with EmbeddedServer.start() as server:
        yield server
