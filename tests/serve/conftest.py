from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from httpx import Client as HTTPClient

from penstock import serve
from tests.support.brokers import Brokers, clean

StartClient = Callable[..., serve.Client]


@pytest.fixture
def start(cluster: str, redis_url: str) -> Iterator[StartClient]:
    """Starts instances, by default without HTTP, that end with the test."""
    with ExitStack() as started:

        def start(**options: Any) -> serve.Client:
            defaults: dict[str, Any] = {"redis_url": redis_url, "http_options": {"location": None}}
            client = serve.start(**{**defaults, **options})
            started.callback(client.shutdown)
            return client

        yield start


@pytest.fixture
def client(start: StartClient) -> serve.Client:
    """An instance without HTTP."""
    return start()


@pytest.fixture
def web(start: StartClient) -> serve.Client:
    """An instance with HTTP on a free port."""
    return start(http_options={"port": 0})


@pytest.fixture(scope="module")
def standing(cluster: str, brokers: Brokers) -> Iterator[serve.Client]:
    """An instance for all tests of a module, with backend `f` and endpoint `api`."""
    with clean(brokers.url("embedded")) as url:
        client = serve.start(redis_url=url, instance="standing", http_options={"location": None})
        client.create_backend("f", _echo, ray_actor_options={"num_cpus": 0.1})
        client.create_endpoint("api", backend="f", route="/api/{x}", methods=["GET", "POST"])
        yield client
        client.shutdown()


@pytest.fixture
def http(web: serve.Client) -> Iterator[HTTPClient]:
    """An HTTP client of ``web``."""
    assert web.http_url is not None
    with HTTPClient(base_url=web.http_url, timeout=30) as http:
        yield http


def _echo(request: serve.Request) -> Any:
    return {"data": request.data, "params": request.path_params}
