"""Every wrong call raises at the call, names the thing, and changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from penstock import serve
from penstock.broker.registry.records import Snapshot
from penstock.broker.registry.reports import ReplicaReport
from penstock.handles import background_loop
from penstock.handles.errors import BackendError, BackendNotFound, ConfigError, EndpointNotFound
from penstock.serve.instance import Instance
from tests.serve.backends import SMALL
from tests.support.frames import frames_below

# An untyped client, for calls with deliberately wrong types.
Loose = Any


def function(request: serve.Request) -> None: ...


def no_request() -> None: ...


class Model:
    def __init__(self, path: str) -> None: ...

    def __call__(self, request: serve.Request) -> None: ...


class NotCallable: ...


class Raises:
    def __init__(self) -> None:
        raise ValueError("the weights are missing")

    def __call__(self, request: serve.Request) -> None: ...


class Unhealthy:
    def __call__(self, request: serve.Request) -> None: ...

    def reconfigure(self, user_config: object) -> None:
        raise ValueError(f"cannot use {user_config!r}")


class Exits:
    def __init__(self) -> None:
        import os

        os._exit(7)

    def __call__(self, request: serve.Request) -> None: ...


def state(client: serve.Client) -> tuple[Snapshot, int, int]:
    """Return what a call could change: the records, and the numbers of stored code blobs and of replicas."""

    async def read() -> tuple[Snapshot, int, int]:
        instance = await Instance(client.redis_url, "standing").open()
        try:
            snapshot = await instance.snapshot()
            replicas = await instance.registry.get_reports(ReplicaReport)
            connection = instance._connection  # pyright: ignore[reportPrivateUsage]
            codes = await connection.send("KEYS", "penstock:standing:{registry}:code:*")
            return Snapshot(0, snapshot.backends, snapshot.endpoints), len(codes), len(replicas)
        finally:
            await instance.close()

    return background_loop.run(read())


WRONG: list[tuple[Callable[[Loose], object], type[Exception], str]] = [
    # Names.
    (lambda c: c.create_backend("a b", function), ConfigError, "a backend 'a b' must be 1 to 128 letters"),
    (lambda c: c.create_backend("", function), ConfigError, "a backend '' must be"),
    (lambda c: c.create_backend(3, function), TypeError, "a backend must be a str, not int"),
    (lambda c: c.create_backend("registry", function), ConfigError, "cannot be called 'registry'"),
    (lambda c: c.create_backend("f", function), ConfigError, "backend 'f' already exists"),
    (lambda c: c.create_endpoint("api", backend="f"), ConfigError, "endpoint 'api' already exists"),
    (lambda c: c.create_endpoint("a/b", backend="f"), ConfigError, "an endpoint 'a/b' must be"),
    (lambda c: c.create_endpoint(None, backend="f"), TypeError, "an endpoint must be a str, not NoneType"),
    # Unknown names.
    (lambda c: c.create_endpoint("e", backend="x"), BackendNotFound, "no backend 'x'; this instance has 'f'"),
    (lambda c: c.update_backend("x", function), BackendNotFound, "no backend 'x'"),
    (lambda c: c.update_backend_config("x", {}), BackendNotFound, "no backend 'x'"),
    (lambda c: c.get_backend_config("x"), BackendNotFound, "no backend 'x'"),
    (lambda c: c.delete_backend("x"), BackendNotFound, "no backend 'x'"),
    (lambda c: c.delete_endpoint("x"), EndpointNotFound, "no endpoint 'x'; this instance has 'api'"),
    (lambda c: c.get_handle("x"), EndpointNotFound, "no endpoint 'x'; this instance has 'api'"),
    (lambda c: c.set_traffic("x", {"f": 1}), EndpointNotFound, "no endpoint 'x'"),
    (lambda c: c.set_traffic("api", {"x": 1}), BackendNotFound, "no backend 'x'"),
    (lambda c: c.shadow_traffic("x", "f", 1), EndpointNotFound, "no endpoint 'x'"),
    (lambda c: c.shadow_traffic("api", "x", 1), BackendNotFound, "no backend 'x'"),
    # In use.
    (lambda c: c.delete_backend("f"), ConfigError, "backend 'f' is used by endpoint 'api'"),
    (lambda c: c.delete_backend("f", force=True), ConfigError, "backend 'f' is used by endpoint 'api'"),
    # Routes and methods.
    (
        lambda c: c.create_endpoint("e", backend="f", route="/api/{y}"),
        ConfigError,
        "endpoint 'api' has the route '/api/{x}' for GET, POST; endpoint 'e' cannot have '/api/{y}' for GET",
    ),
    (lambda c: c.create_endpoint("e", backend="f", route="api"), ConfigError, "'api' must begin with '/'"),
    (lambda c: c.create_endpoint("e", backend="f", route="/-/x"), ConfigError, "'/-/x' is below '/-/'"),
    (lambda c: c.create_endpoint("e", backend="f", route="/{x:date}"), ConfigError, "the convertor 'date'"),
    (lambda c: c.create_endpoint("e", backend="f", route=3), TypeError, "a route must be a str, not int"),
    (lambda c: c.create_endpoint("e", backend="f", methods="GET"), TypeError, "methods must be a list of str"),
    (lambda c: c.create_endpoint("e", backend="f", methods=["GTE"]), ConfigError, "the method 'GTE' must be one"),
    # Traffic.
    (lambda c: c.set_traffic("api", {"f": 0.9}), ConfigError, "must sum to 1; they sum to 0.9"),
    (lambda c: c.set_traffic("api", {}), ConfigError, "they sum to 0"),
    (lambda c: c.set_traffic("api", {"f": -1}), ConfigError, "the weight of 'f' must not be negative"),
    (lambda c: c.set_traffic("api", ["f"]), TypeError, "traffic must be a dict of weights by backend, not list"),
    (lambda c: c.shadow_traffic("api", "f", 2), ConfigError, "proportion must be 0 to 1, not 2"),
    # Code.
    (lambda c: c.create_backend("b", no_request), TypeError, "no_request must take one request"),
    (lambda c: c.create_backend("b", function, 1), TypeError, "only a class is constructed with arguments"),
    (lambda c: c.create_backend("b", Model), TypeError, "the constructor of Model does not accept the given arguments"),
    (lambda c: c.create_backend("b", NotCallable), TypeError, "NotCallable must have a method __call__"),
    (lambda c: c.create_backend("b", 3), TypeError, "a backend must be a function, a class, serve.asgi"),
    (lambda c: c.create_backend("b", "nowhere"), ConfigError, "the import path 'nowhere' must look like"),
    (lambda c: c.create_backend("b", Model, threading.Lock()), TypeError, "must be picklable: cannot pickle"),
    (lambda c: c.update_backend("f", no_request), TypeError, "no_request must take one request"),
    # Configurations.
    (
        lambda c: c.create_backend("b", function, config={"max_batch_size": 4}),
        ConfigError,
        "max_batch_size is 4, but function takes one request: mark it with @serve.accept_batch",
    ),
    (
        lambda c: c.update_backend_config("f", {"max_batch_size": 4}),
        ConfigError,
        "max_batch_size is 4, but the code of 'f' takes one request",
    ),
    (
        lambda c: c.create_backend("b", function, config={"user_config": 1}),
        ConfigError,
        "user_config is given, but function has no method reconfigure",
    ),
    (
        lambda c: c.create_backend("b", function, config={"replicas": 4}),
        ConfigError,
        "BackendConfig has no field 'replicas'; did you mean 'num_replicas'?",
    ),
    (lambda c: c.create_backend("b", function, config=3), TypeError, "config must be BackendConfig, a dict"),
    (
        lambda c: c.update_backend_config("f", {"num_replicas": 0}),
        ConfigError,
        "BackendConfig.num_replicas must be greater than or equal to 1, not 0",
    ),
    (
        lambda c: c.update_backend_config("f", {"num_replicas": "2"}),
        TypeError,
        "BackendConfig.num_replicas must be a valid integer, not str",
    ),
    (
        lambda c: c.create_backend("b", function, ray_actor_options={"num_cpu": 1}),
        ConfigError,
        "ray_actor_options may hold num_cpus, num_gpus, memory, resources, accelerator_type, not 'num_cpu'",
    ),
    (lambda c: c.create_backend("b", function, runtime_env=[]), TypeError, "runtime_env must be a dict, not list"),
    (
        lambda c: c.update_backend("f", function, runtime_env={"working_dir": "/nowhere"}),
        ConfigError,
        "working_dir of runtime_env must be a directory of this machine, or a URI",
    ),
    # Errors that appear when replicas start.
    (
        lambda c: c.create_backend("b", function, ray_actor_options={"num_cpus": 64}),
        ConfigError,
        "backend 'b': 1 replica with CPU 64 each requested, room for 0: node ",
    ),
    (
        lambda c: c.create_backend("b", function, config={"num_replicas": 3}, ray_actor_options={"num_cpus": 4}),
        ConfigError,
        "backend 'b': 3 replicas with CPU 4 each requested, room for 1: node ",
    ),
    (
        lambda c: c.create_backend("b", function, ray_actor_options={"resources": {"tpu": 1}, "num_cpus": 0}),
        ConfigError,
        "1 replica with tpu 1 each requested, room for 0",
    ),
    (
        lambda c: c.update_backend_config("f", {"num_replicas": 1000}),
        ConfigError,
        "backend 'f': 1000 replicas with CPU 0.1 each requested, room for ",
    ),
    (lambda c: c.create_backend("b", Raises, ray_actor_options=SMALL), BackendError, "the weights are missing"),
    (
        lambda c: c.create_backend("b", Unhealthy, config={"user_config": 3}, ray_actor_options=SMALL),
        BackendError,
        "ValueError: cannot use 3",
    ),
    (
        lambda c: c.create_backend(
            "b", "operator:itemgetter", 0, config={"max_batch_size": 4}, ray_actor_options=SMALL
        ),
        ConfigError,
        "max_batch_size is 4, but itemgetter takes one request: mark it with @serve.accept_batch",
    ),
    (
        lambda c: c.create_backend("b", "operator:itemgetter", 0, config={"user_config": 1}, ray_actor_options=SMALL),
        ConfigError,
        "user_config is given, but itemgetter has no method reconfigure",
    ),
    (lambda c: c.create_backend("b", Exits, ray_actor_options=SMALL), BackendError, "died"),
    (lambda c: c.update_backend("f", Raises), BackendError, "the weights are missing"),
]


@pytest.mark.parametrize(("call", "kind", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_a_wrong_call_changes_nothing(
    standing: serve.Client, call: Callable[[Loose], object], kind: type[Exception], says: str
) -> None:
    before = state(standing)
    with pytest.raises(kind) as raised:
        call(standing)
    assert says in str(raised.value)
    assert frames_below(__file__, raised.value) <= 2
    after = state(standing)
    assert without_config_version(after) == without_config_version(before)


def without_config_version(state: tuple[Snapshot, int, int]) -> Any:
    """An undone change has incremented the version."""
    snapshot, codes, replicas = state
    backends = {
        tag: (record.version, record.code, record.config, record.actor_options)
        for tag, record in snapshot.backends.items()
    }
    return backends, snapshot.endpoints, codes, replicas


def test_the_error_of_a_constructor_has_its_traceback(standing: serve.Client) -> None:
    with pytest.raises(BackendError) as raised:
        standing.create_backend("b", Raises, ray_actor_options=SMALL)
    assert raised.value.type_name == "ValueError"
    assert raised.value.message == "the weights are missing"
    assert 'raise ValueError("the weights are missing")' in raised.value.traceback


def test_of_two_concurrent_creations_one_succeeds(standing: serve.Client) -> None:
    async def both() -> list[BaseException | None]:
        create = [
            asyncio.to_thread(standing.create_backend, "twice", function, ray_actor_options=SMALL) for _ in range(2)
        ]
        return await asyncio.gather(*create, return_exceptions=True)

    errors = [error for error in asyncio.run(both()) if error is not None]
    assert len(errors) == 1
    assert "backend 'twice' already exists" in str(errors[0])
    standing.delete_backend("twice")
