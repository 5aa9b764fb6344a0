"""Start of an instance, and connecting to one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from secrets import token_hex
from typing import Any, cast
from urllib.parse import urlsplit

import ray
from ray._private.utils import read_ray_address
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..broker.defaults import default_instance, default_url, needed_url
from ..broker.embedded.server import EmbeddedServer
from ..broker.errors import ConfigError, EmbeddedServerError
from ..broker.transport.dial import user_of
from ..broker.transport.url import REDIS_URL, shown_url
from ..broker.wire.keys import Keys
from ..handles import background_loop
from ..workers.actor import NAMESPACE
from .client import Client
from .config import HTTPOptions
from .controller.actors import actor_name, alive_nodes, error_of
from .controller.controller import LEASE_S, Actor
from .instance import Instance
from .settings import Settings, dump_http
from .validation import check_memory

_CONCURRENCY = 10_000
"""Every replica and every proxy has a call pending on the controller."""


def start(
    *,
    redis_url: str | None = None,
    instance: str | None = None,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    max_memory_bytes: int | None = None,
    replica_redis_url: str | None = None,
    proxy_redis_url: str | None = None,
) -> Client:
    """Start an instance of Penstock; return when its HTTP server takes connections.

    It runs on the Ray that this process is connected to; else on the cluster that ``RAY_ADDRESS`` names; else on a
    local one, which is started and ends with it. It ends with the script, unless it is ``detached``: then it runs, at
    last, on the Ray of this machine, which must be there.

    Args:
        redis_url: the broker: ``redis://``, ``rediss://`` or ``unix://``. Without it, ``PENSTOCK_REDIS_URL``;
            without that, a server of its own, which only this machine reaches.
        instance: its name. Without it, ``PENSTOCK_INSTANCE``; without that, ``"default"``. Instances of different
            names share a Redis and a Ray without touching each other.
        detached: True for one that outlives the script. ``serve.connect`` finds it, and its ``shutdown`` ends it.
        http_options: `HTTPOptions`, or a dict of its fields. By default HTTP is served on ``127.0.0.1:8000``.
        data_dir: a directory for the embedded server to keep its data in. On one that holds an instance, that is
            resumed: backends, endpoints, traffic, every unsettled request. `Client.shutdown` deletes them; the end
            of the script does not.
        max_memory_bytes: the most that the data of the embedded server may take, at least 16 MiB. Without it,
            ``PENSTOCK_MAX_MEMORY_BYTES``; without that, a quarter of the memory of this machine or container. At the
            limit new requests are refused with 503, and what was accepted completes.
        replica_redis_url: the same broker as replicas reach it, such as with a Redis user of their own; see
            ``docs/security.md``. Without it, ``redis_url``.
        proxy_redis_url: as proxies reach it.

    Raises:
        TypeError: an argument is of the wrong type.
        ConfigError: a value cannot be, the HTTP port is in use, or the instance runs already; the message says what
            to do.
        BrokerUnavailable: Redis cannot be reached, or does not let us in.
        NotPermitted: its rules do not let the user of one of the URLs do what that takes.
    """
    instance = default_instance() if instance is None else instance
    Keys(instance)
    options = HTTPOptions.of(http_options, "http_options")
    url = _redis_url(redis_url)
    _check_broker(url, detached, data_dir)
    memory_bytes = check_memory(url, max_memory_bytes)
    _check_door(url, "replica_redis_url", replica_redis_url)
    _check_door(url, "proxy_redis_url", proxy_redis_url)
    plain, middlewares = dump_http(options)
    with ExitStack() as undo:
        if _join_ray(detached):
            undo.callback(cast(Any, ray.shutdown))
        if url is None:
            url = undo.enter_context(_embedded_server(data_dir, memory_bytes)).url
        node = ray.get_runtime_context().get_node_id()
        settings = Settings(owner=token_hex(8), node=node, http=plain, detached=detached)
        opened = background_loop.run(Instance(url, instance).open())
        undo.callback(lambda: background_loop.run(opened.close()))
        resumed = background_loop.run(_found(opened, settings, middlewares))
        try:
            controller = _start_controller(opened, settings, replica_redis_url or url, proxy_redis_url or url)
        except BaseException:
            background_loop.run(_unfound(opened, settings, resumed))
            raise
        try:
            http_url = background_loop.run(_bring_up(opened, controller))
        except BaseException:
            try:
                background_loop.run(opened.end(erase=not resumed))
            finally:
                _end_for_good(controller)
            raise
        if not detached:  # else it ends by `shutdown`, and by nothing that becomes of this process
            undo.callback(_end_for_good, controller)
        return Client(opened, http_url, started=undo.pop_all(), owns=not detached, keep=data_dir is not None)


def connect(redis_url: str | None = None, instance: str | None = None) -> Client:
    """Find an instance that runs: a detached one, or, from inside a backend, one's own. Needs no Ray.

    Args:
        redis_url: its broker. Without it, inside a backend that of the backend's instance, elsewhere
            ``PENSTOCK_REDIS_URL``.
        instance: its name. Without it, inside a backend that of the backend's instance, elsewhere
            ``PENSTOCK_INSTANCE``, or ``"default"``.

    Raises:
        TypeError: an argument is of the wrong type.
        ConfigError: there is no such instance, or it is not known which Redis it would be on.
        BrokerUnavailable: Redis cannot be reached, or does not let us in.
        NotPermitted: its rules do not let the user of the URL do what that takes.
    """
    instance = default_instance() if instance is None else instance
    Keys(instance)
    url = needed_url(_redis_url(redis_url))
    opened = background_loop.run(Instance(url, instance).open())
    with ExitStack() as undo:
        undo.callback(lambda: background_loop.run(opened.close()))
        http_url = background_loop.run(_find(opened))
        undo.pop_all()
    return Client(opened, http_url, owns=False, keep=True)


async def _find(instance: Instance) -> str | None:
    if await Settings.read(instance.registry) is None:
        url = shown_url(instance.redis_url)
        raise ConfigError(
            f"there is no instance {instance.name!r} on {url}; serve.start() or `penstock start` starts one"
        )
    return await instance.http_url()


async def _found(instance: Instance, settings: Settings, middlewares: bytes) -> bool:
    """Make the instance ours, and write down how it is to run; tell whether there was one to resume."""
    registry = instance.registry
    await instance.take(settings.owner, LEASE_S)
    resumed = await Settings.read(registry) is not None
    if middlewares:
        settings = replace(settings, middlewares=await registry.put_code(middlewares))
    await settings.write(registry)
    return resumed


async def _unfound(instance: Instance, settings: Settings, resumed: bool) -> None:
    if resumed:
        await instance.registry.disown(settings.owner)
    else:
        await instance.registry.erase()


async def _bring_up(instance: Instance, controller: Any) -> str | None:
    """Wait for the proxies, and return where they serve."""
    try:
        await controller.ready.remote()
    except RayError as e:
        raise error_of(e) from None
    http_url = await instance.http_url()
    settings = await Settings.read(instance.registry)
    if settings is not None and http_url is not None:
        # A proxy that replaces another one is to be found where that was.
        http = {**settings.http, "port": urlsplit(http_url).port}
        await replace(settings, http=http).write(instance.registry)
    return http_url


def _start_controller(instance: Instance, settings: Settings, replica_redis_url: str, proxy_redis_url: str) -> Any:
    name = actor_name(instance.name, "controller")
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached" if settings.detached else "non_detached",
        "num_cpus": 0,
        # A byte, as an actor that asks for nothing is put on any node by Ray, unless it must be on a certain one.
        "memory": 1,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": _CONCURRENCY,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=settings.node, soft=True),
    }
    try:
        return Actor.options(**options).remote(instance.redis_url, instance.name, replica_redis_url, proxy_redis_url)
    except ValueError:  # that is how Ray says that the name is taken
        raise ConfigError(
            f"the instance {instance.name!r} runs already in this Ray cluster, on another Redis: "
            "start(instance=...) with another name starts one beside it"
        ) from None


def _end_for_good(controller: Any) -> None:
    """End the controller, and with it whatever is left of its instance."""
    with suppress(RayError, ValueError):  # it has ended by itself, as it should
        if ray.is_initialized():
            ray.kill(controller)


def _redis_url(given: object) -> str | None:
    if not isinstance(given, str | None):
        raise TypeError(f"redis_url must be a str, not {type(given).__name__}")
    return given or default_url()


def _check_broker(url: str | None, detached: bool, data_dir: object) -> None:
    if not isinstance(data_dir, str | os.PathLike | None):
        raise TypeError(f"data_dir must be a str or a Path, not {type(data_dir).__name__}")
    if url is not None and data_dir is not None:
        raise ConfigError(
            f"data_dir is for the embedded server, and {shown_url(url)} is another one: leave out one of them"
        )
    if url is None and detached:
        raise ConfigError(
            "a detached instance outlives this process, and an embedded server does not: give the redis_url of "
            f"one that runs, or set {REDIS_URL}"
        )


def _check_door(redis_url: str | None, name: str, given: object) -> None:
    if not isinstance(given, str | None):
        raise TypeError(f"{name} must be a str, not {type(given).__name__}")
    if given is None:
        return
    if redis_url is None:
        raise ConfigError(
            f"{name} is another way to the broker of redis_url, and without that the broker is an embedded one"
        )
    user_of(given)


def _join_ray(detached: bool) -> bool:
    """Connect this process to Ray, and tell whether it was not so before. All but detached ones may start a local one.

    Raises:
        ConfigError: there is none that outlives this process.
    """
    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, logging_level=logging.ERROR)
    elif detached:
        if not join_lasting_ray(logging_level=logging.ERROR):
            raise ConfigError(
                "a detached instance outlives this process, and so must its Ray: no such Ray runs on this machine, and "
                "RAY_ADDRESS names none; `ray start --head` starts one"
            )
    else:
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    return True


def join_lasting_ray(**options: Any) -> bool:
    """Connect to the Ray cluster that ``ray start`` has begun on this machine; tell whether there is one.

    What Ray itself would find could also be the local one of some script, and end with that.
    """
    if not read_ray_address():
        return False
    try:
        cast(Any, ray.init)(address="auto", **options)
    except ConnectionError:
        return False
    return True


def _embedded_server(data_dir: str | os.PathLike[str] | None, memory_bytes: int | None) -> EmbeddedServer:
    if (nodes := len(alive_nodes())) > 1:
        raise ConfigError(
            f"an embedded server is reached from one machine only, and this Ray cluster has {nodes} nodes: give the "
            f"redis_url of a server that all of them reach, or set {REDIS_URL}"
        )
    try:
        path = None if data_dir is None else os.fspath(data_dir)
        return EmbeddedServer.start(data_dir=path, max_memory_bytes=memory_bytes)
    except EmbeddedServerError as e:
        raise ConfigError(str(e)) from None
