import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import handles
from penstock.broker.embedded.server import EmbeddedServer
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Site


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    """An instance on the embedded server. Closing it erases its keys."""
    site = Site(redis_url)
    yield site
    site.close()


@pytest.fixture
def any_site(broker_url: str) -> Iterator[Site]:
    """An instance on each kind of broker in turn."""
    site = Site(broker_url)
    yield site
    site.close()


@pytest.fixture
def durable() -> Iterator[EmbeddedServer]:
    """A server for one test, which keeps its data across restarts."""
    with tempfile.TemporaryDirectory() as parent, EmbeddedServer.start(data_dir=Path(parent) / "data") as server:
        yield server


@pytest.fixture
def connected(site: Site) -> Iterator[Connection]:
    """A connection to `site`."""
    with handles.connect(site.url, INSTANCE) as connected:
        yield connected
