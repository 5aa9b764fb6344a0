"""``options(return_type="object_ref")``: results for ``ray.get``, ``ray.wait`` and ``await``."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
import ray

from penstock import serve
from tests.support.brokers import Brokers, clean
from tests.support.waiting import wait_until

SMALL = {"num_cpus": 0.1}


class Served:
    """Returns a result, raises, or waits until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, request: serve.Request) -> Any:
        if request.data == "fail":
            raise ValueError("as asked")
        if request.data == "wait":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return [request.data, dict(request.query_params)]

    def how_many_cancelled(self, request: serve.Request) -> int:
        return self.cancelled


@pytest.fixture(scope="module")
def client(cluster: str, brokers: Brokers) -> Iterator[serve.Client]:
    with clean(brokers.url("embedded")) as url:
        client = serve.start(redis_url=url, instance="refs", http_options={"location": None})
        client.create_backend("served", Served, ray_actor_options=SMALL)
        client.create_endpoint("served", backend="served")
        yield client
        client.shutdown()


@pytest.fixture
def handle(client: serve.Client) -> serve.ServeHandle:
    return client.get_handle("served")


def get(ref: Any) -> Any:
    return cast("Any", ray).get(ref, timeout=30)


def test_ray_get_returns_the_results_of_a_sync_handle(handle: serve.ServeHandle) -> None:
    refs: list[Any] = [handle.options(return_type="object_ref").remote(n, q=1) for n in range(20)]
    assert all(isinstance(ref, ray.ObjectRef) for ref in refs)
    assert get(refs) == [[n, {"q": 1}] for n in range(20)]


def test_ray_wait_returns_the_first_result(handle: serve.ServeHandle) -> None:
    caller = handle.options(return_type="object_ref")
    slow: Any = caller.remote("wait")
    quick: Any = caller.remote("quick")
    done, waiting = cast("Any", ray).wait([slow, quick], num_returns=1, timeout=30)
    assert done == [quick]
    assert waiting == [slow]
    cast("Any", ray).cancel(slow)
    wait_until(lambda: handle.options(method_name="how_many_cancelled").remote().result(10) == 1)


async def test_a_reference_can_be_awaited(client: serve.Client, handle: serve.ServeHandle) -> None:
    ahandle = client.get_handle("served", sync=False).options(return_type="object_ref")
    ref: Any = await ahandle.remote("x")
    assert await ref == ["x", {}]


def test_ray_get_raises_the_error_of_the_backend(handle: serve.ServeHandle) -> None:
    with pytest.raises(serve.errors.BackendError, match="ValueError: as asked"):
        get(handle.options(return_type="object_ref").remote("fail"))


def test_a_future_is_the_default(handle: serve.ServeHandle) -> None:
    assert handle.options(return_type="future").remote("x").result(10) == ["x", {}]


def test_another_return_type_is_refused_by_name(handle: serve.ServeHandle) -> None:
    with pytest.raises(serve.errors.ConfigError, match="return_type must be one of future, object_ref, not 'ref'"):
        handle.options(return_type="ref")
    with pytest.raises(TypeError, match="return_type must be a str, not int"):
        handle.options(return_type=cast("Any", 1))
