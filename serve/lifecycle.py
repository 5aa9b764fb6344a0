"""Start of an instance, and connecting to a running one.

Everything that can be checked without Ray is checked before Ray is imported and started, which takes many seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from ..broker.defaults import needed_url
from ..broker.embedded.server import EmbeddedServer
from ..broker.errors import ConfigError, EmbeddedServerError
from ..broker.transport.dial import check_listens
from ..broker.transport.url import REDIS_URL, shown_url
from ..handles import background_loop
from ..handles._tracebacks import short_traceback
from ..runtime.extras import needed
from ..runtime.sigterm import keeping_sigterm
from .client import Client
from .config import HTTPOptions
from .instance import Instance
from .settings import LEASE_S, ProcessArguments, Settings
from .start_arguments import StartArguments, broker_url, instance_name
from .status.reader import no_instance

_RAY_CLIENT = "ray://"
"""How the address of a Ray cluster begins to which a process connects through Ray Client."""

_started: WeakValueDictionary[str, Client] = WeakValueDictionary()
"""The clients that `start` returned in this process, by instance."""


_instead_of_start: list[Callable[[StartArguments], Client]] = []
"""At most one function: what `start` calls in a process that runs the new version of a script."""


def attach_instead(make_client: Callable[[StartArguments], Client]) -> None:
    """Make `start` return ``make_client(arguments)`` in this process, instead of starting an instance."""
    _instead_of_start[:] = [make_client]


def started_clients() -> list[Client]:
    """Return the open clients that `start` returned in this process."""
    return [client for client in _started.values() if not client.is_closed]


@short_traceback
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
    """Start an instance; return when its HTTP server accepts connections.

    It runs on the Ray cluster that this process is connected to, else on that of ``RAY_ADDRESS``, else on a local
    cluster, which is started here and ends with the process. A detached instance uses the cluster that ``ray start``
    has started on this machine instead of a local one.

    The instance ends with the script unless it is ``detached``. SIGTERM then ends the script as ``sys.exit(143)`` does,
    unless it has a handler of its own.

    Args:
        redis_url: the broker: ``redis://``, ``rediss://`` or ``unix://``, or ``redis+sentinel://`` (see
            ``docs/operations.md``). Default: ``PENSTOCK_REDIS_URL``, else an embedded server, which only this machine
            can reach.
        instance: the name of the instance. Default: ``PENSTOCK_INSTANCE``, else ``"default"``. Instances with
            different names can share a Redis and a Ray cluster.
        detached: whether the instance outlives the script. ``serve.connect`` connects to it, and
            `Client.shutdown` ends it.
        http_options: `HTTPOptions`, or a dict of its fields. By default HTTP is served on ``127.0.0.1:8000``.
        data_dir: the directory of the embedded server's data. An instance that is found there is resumed, with its
            backends, endpoints, traffic and every unsettled request. `Client.shutdown` deletes it; the end of the
            script does not.
        max_memory_bytes: the memory limit of the embedded server's data, at least 16 MiB. Default:
            ``PENSTOCK_MAX_MEMORY_BYTES``, else a quarter of the memory of this machine or container. At the limit new
            requests are refused with 503, and accepted ones are completed.
        replica_redis_url: the broker's URL for replicas, such as with a Redis user of their own; see
            ``docs/security.md``. Default: ``redis_url``.
        proxy_redis_url: the broker's URL for proxies. Default: ``redis_url``.

    Raises:
        TypeError: an argument has the wrong type.
        ConfigError: a value is not allowed, the HTTP port is in use, the instance is already running, or there is no
            Ray cluster for it.
        BrokerUnavailable: Redis cannot be reached, or rejected the login.
        NotPermitted: the rules of Redis are too narrow for the user of one of the URLs.
        PenstockError: Ray cannot be started on this machine.
    """
    arguments = StartArguments.checked(
        redis_url=redis_url,
        instance=instance,
        detached=detached,
        http_options=http_options,
        data_dir=data_dir,
        max_memory_bytes=max_memory_bytes,
        replica_redis_url=replica_redis_url,
        proxy_redis_url=proxy_redis_url,
    )
    if _instead_of_start:
        return _instead_of_start[0](arguments)
    _check_not_started(arguments)
    if arguments.redis_url is not None:
        check_listens(arguments.redis_url)
    owner = token_hex(8)
    with ExitStack() as undo:
        url = arguments.redis_url or undo.enter_context(_embedded_server(arguments)).url
        core = background_loop.run(Instance(url, arguments.instance).open())
        undo.callback(lambda: background_loop.run(core.close()))
        resumed = background_loop.run(_acquire(core, owner, arguments))
        try:
            # Not above: the import of Ray takes a second, and what was wrong so far needed none.
            needed("ray", "serve.start")
            from .first_actors import FirstProxy, end_actor, start_controller, wait_until_ready
            from .ray_cluster import join_ray, leave_ray
            from .ray_nodes import address_of, own_node

            with nullcontext() if detached else keeping_sigterm():
                if join_ray(detached=detached):
                    undo.callback(leave_ray)
            if arguments.redis_url is None:
                _check_single_node()
            node = own_node()
            settings = Settings(
                owner=owner,
                node=node,
                address=address_of(node),
                http=arguments.plain_http,
                detached=detached,
            )
            background_loop.run(_write_settings(core, settings, arguments.middlewares))
            passed = ProcessArguments(
                arguments.instance, url, replica_redis_url or url, proxy_redis_url or url, arguments.environment
            )
            controller = start_controller(passed, node=node, detached=detached)
        except BaseException:
            background_loop.run(_release(core, owner, resumed))
            raise
        try:
            # Else the proxies of an earlier run may still be ending, or the proxy must outlive this process.
            if not resumed and not detached and arguments.http.location != "NoServer":
                first = FirstProxy(passed, node)
                background_loop.run(core.registry.put_report(first.name, first.report))
                undo.callback(end_actor, first.start(arguments.proxy_options))
            background_loop.run(wait_until_ready(controller))
            http_url = background_loop.run(_keep_port(core))
        except BaseException:
            try:
                background_loop.run(core.end(erase=not resumed))
            finally:
                end_actor(controller)
            raise
        if not detached:  # A detached instance ends by `shutdown` alone, and not with this process.
            undo.callback(end_actor, controller)
        client = Client(core, http_url, started=undo.pop_all(), owns=not detached, keep=data_dir is not None)
        _started[arguments.instance] = client
        return client


def check_start(arguments: StartArguments) -> None:
    """Raise what `start` would raise with ``arguments`` before it needs Ray. The broker must not be embedded."""
    url = needed_url(arguments.redis_url)
    check_listens(url)
    core = background_loop.run(Instance(url, arguments.instance).open())
    try:
        owner = token_hex(8)
        background_loop.run(_acquire(core, owner, arguments))
        background_loop.run(core.registry.disown(owner))
    finally:
        background_loop.run(core.close())


@short_traceback
def connect(redis_url: str | None = None, instance: str | None = None) -> Client:
    """Connect to a running instance: a detached one, or that of the backend in which this is called. Needs no Ray.

    Args:
        redis_url: the broker. Default: inside a backend that of its instance, elsewhere ``PENSTOCK_REDIS_URL``.
        instance: the name of the instance. Default: inside a backend its own instance, elsewhere
            ``PENSTOCK_INSTANCE``, else ``"default"``.

    Raises:
        TypeError: an argument has the wrong type.
        ConfigError: there is no such instance, or the broker is not known.
        BrokerUnavailable: Redis cannot be reached, or rejected the login.
        NotPermitted: the rules of Redis are too narrow for the user of the URL.
    """
    name = instance_name(instance)
    core = background_loop.run(Instance(needed_url(broker_url(redis_url)), name).open())
    with ExitStack() as undo:
        undo.callback(lambda: background_loop.run(core.close()))
        http_url = background_loop.run(_find(core))
        undo.pop_all()
    return Client(core, http_url, owns=False, keep=True)


async def _find(core: Instance) -> str | None:
    if await Settings.read(core.registry) is None:
        raise no_instance(core.redis_url, core.name)
    return await core.http_url()


def _check_not_started(arguments: StartArguments) -> None:
    """Refuse a second start of an instance in this process. The first one would be unreachable for the caller."""
    client = _started.get(arguments.instance)
    if client is None or client.is_closed or arguments.redis_url not in (None, client.redis_url):
        return
    raise ConfigError(
        f"the instance {client.instance!r} is already running in this process: use the client that serve.start() "
        f"returned, or serve.connect({shown_url(client.redis_url)!r}, {client.instance!r}); client.shutdown() ends it; "
        "another name (instance=...) starts one beside it"
    )


async def _acquire(core: Instance, owner: str, arguments: StartArguments) -> bool:
    """Acquire the ownership of the instance, and check that HTTP can be served; return whether it is resumed."""
    await core.acquire(owner, LEASE_S)
    if await Settings.read(core.registry) is not None:
        return True  # The proxies of its previous run may still be ending, so the port is not checked yet.
    if not _is_remote():
        try:
            arguments.check_http_address()
        except BaseException:
            await core.registry.disown(owner)
            raise
    return False


def _is_remote() -> bool:
    """Return whether this process is, or will be, connected to Ray through Ray Client, from another machine."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return bool(ray.util.client.ray.is_connected())
    return os.environ.get("RAY_ADDRESS", "").startswith(_RAY_CLIENT)


def _check_single_node() -> None:
    from .ray_nodes import alive_nodes

    if (nodes := len(alive_nodes())) > 1:
        raise ConfigError(
            f"an embedded server can be reached from one machine only, and this Ray cluster has {nodes} nodes: give "
            f"the redis_url of a server that all nodes reach, or set {REDIS_URL}"
        )


async def _write_settings(core: Instance, settings: Settings, middlewares: bytes) -> None:
    await core.acquire(settings.owner, LEASE_S)  # Again: the ownership may have expired while Ray started.
    if middlewares:
        settings = replace(settings, middlewares=await core.registry.put_code(middlewares))
    await settings.write(core.registry)


async def _release(core: Instance, owner: str, resumed: bool) -> None:
    """Undo `_acquire` and `_write_settings`."""
    if resumed:
        await core.registry.disown(owner)
    else:
        await core.registry.erase()


async def _keep_port(core: Instance) -> str | None:
    """Return the URL of a proxy. A proxy that is restarted uses the port that the first one picked, also for port 0."""
    http_url = await core.http_url()
    settings = await Settings.read(core.registry)
    if settings is not None and http_url is not None:
        http = {**settings.http, "port": urlsplit(http_url).port}
        await replace(settings, http=http).write(core.registry)
    return http_url


def _embedded_server(arguments: StartArguments) -> EmbeddedServer:
    try:
        path = None if arguments.data_dir is None else os.fspath(arguments.data_dir)
        return EmbeddedServer.start(data_dir=path, max_memory_bytes=arguments.max_memory_bytes)
    except EmbeddedServerError as e:
        raise ConfigError(str(e)) from None
