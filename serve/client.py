"""The client of an instance: its public, blocking API."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from secrets import token_hex
from typing import Any, TypeVar

from ..broker.errors import BrokerUnavailable, PenstockError
from ..broker.registry.records import BackendRecord, EndpointRecord
from ..broker.transport.url import shown_url
from ..broker.wire.keys import check_name
from ..handles import background_loop
from ..handles._tracebacks import short_traceback
from ..handles.connection import CLOSE_TIMEOUT_S, Connection, wait_until_queued
from ..proxy.routing import check_route
from ..workers.asgi.application import AsgiApplication
from ..workers.executing.user_code import dump
from ..workers.runtime_env import pack
from . import registry_changes, validation
from .config import BackendConfig
from .deploy.sources import source_digest
from .instance import CONTROLLER_LOST_S, Instance
from .status.status import Status

log = logging.getLogger(__name__)

T = TypeVar("T")

_WAIT_POLL_S = 1.0
"""Seconds between the checks of `Client.wait` whether the instance was shut down by another client."""

before_waiting: list[Callable[[Client], None]] = []
"""Called with each client that begins to `Client.wait`."""

Target = Callable[..., Any] | AsgiApplication | str
"""Code to deploy: a function, a class, an ASGI application, or an import path of a function or class."""


class Client(Connection):
    """A connection to one instance, made by ``serve.start`` or ``serve.connect``.

    Its methods block and are thread-safe. A method that changes something returns when the change is live; if it
    raises, nothing has changed.

    As a context manager it calls `close` at the end, which ends an instance that ``serve.start`` started, unless that
    is detached.

    A client belongs to the process that made it. In a forked child only its handles, batches and dead letters can be
    used, and the end of the child does not end the instance.
    """

    def __init__(
        self, core: Instance, http_url: str | None, *, started: ExitStack | None = None, owns: bool, keep: bool
    ) -> None:
        """Connect to the instance of ``core``.

        Args:
            core: an open connection to the instance; this client closes it.
            http_url: see the property.
            started: the resources that ``start`` opened, closed with this client.
            owns: whether closing this client ends the instance.
            keep: whether closing this client keeps the keys of the instance, so that it can be resumed.
        """
        super().__init__(core.redis_url, core.name)
        self._core = core
        self._http_url = http_url
        self._started = started or ExitStack()
        self._owns, self._keep = owns, keep
        self._closed = False
        self._closing = threading.Lock()
        self._closing_event = threading.Event()
        self._process = os.getpid()
        if owns:
            atexit.register(self.close)

    @property
    def is_closed(self) -> bool:
        """Whether `close` or `shutdown` was called."""
        return self._closed

    @property
    def http_url(self) -> str | None:
        """The URL of the HTTP server, such as ``"http://127.0.0.1:8000"``; None without a server."""
        return self._http_url

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"Client({self.instance!r}, redis_url={shown_url(self.redis_url)!r}, http_url={self.http_url!r}{closed})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {
            "instance": self.instance,
            "redis_url": shown_url(self.redis_url),
            "http_url": self.http_url,
            "closed": self._closed,
        }

    # -- backends

    @short_traceback
    def create_backend(
        self,
        tag: str,
        func_or_class: Target,
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        **init_kwargs: Any,
    ) -> None:
        """Deploy code as a new backend; return when all replicas are ready, however long their start takes.

        Where Ray's autoscaler adds nodes, it also waits for those, for 15 minutes at most.

        Args:
            tag: the name of the backend: 1 to 128 letters, digits, ``_``, ``.``, ``-`` or ``#``.
            func_or_class: a function of one `Request`, ``async def`` or not; a class whose instances are such
                functions; or the import path of either in the replicas, ``"package.module:Name"``; or an ASGI
                application, as ``serve.asgi(app)``. With `accept_batch` it receives a list of requests and returns a
                list of as many results.
            *init_args: arguments of the class's constructor. They are pickled.
            config: a `BackendConfig`, or a dict of its fields.
            ray_actor_options: resources that each replica reserves: ``num_cpus`` (default 1), ``num_gpus``,
                ``memory`` (bytes), ``resources``, ``accelerator_type``.
            runtime_env: Ray's runtime environment of the replicas: environment variables, working directory,
                packages. ``working_dir`` and ``py_modules`` may name directories of this machine. They are packed when
                this is called, up to 128 MiB, without what ``excludes``, ``.gitignore`` and ``.rayignore`` name. A
                module is imported by the name of its directory.
            **init_kwargs: keyword arguments of the class's constructor. They are pickled.

        Raises:
            TypeError: an argument has the wrong type, the code does not accept one request, the constructor does not
                accept its arguments, or an object cannot be pickled.
            ConfigError: the backend exists, a value is not allowed, the code with its arguments is larger than Redis
                accepts (512 MiB), or the cluster lacks resources for all replicas.
            BackendError: a replica could not start; its ``traceback`` is that of the constructor, or of the lifespan of
                an ASGI application.
        """
        validation.check_tag(tag)
        checked = BackendConfig.parse(config)
        environment = validation.check_runtime_env(runtime_env)
        record = BackendRecord(
            tag=tag,
            version=token_hex(4),
            code="",
            config=checked.spec(),
            actor_options=validation.check_actor_options(ray_actor_options),
            runtime_env=environment,
            accepts_batch=validation.may_take_batches(func_or_class),
            source=source_digest(func_or_class, environment),
        )
        code = _checked_code(func_or_class, init_args, init_kwargs, checked, record.version)
        files = pack(record.runtime_env or {}, record.version)
        self._run(self._core.add_backend(record, code, files))

    @short_traceback
    def update_backend(
        self,
        tag: str,
        func_or_class: Target,
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        **init_kwargs: Any,
    ) -> None:
        """Replace the code of a backend; return when no replica of the old code claims requests any more.

        One old replica drains for each new one that is ready, so that there are never fewer than configured. If the
        new code cannot start, the old code stays.

        Args:
            tag: an existing backend.
            func_or_class: the new code; see `create_backend`.
            *init_args: arguments of the new code's constructor; earlier ones are not kept.
            config: fields to change; all others stay.
            ray_actor_options: see `create_backend`; None keeps the present ones.
            runtime_env: see `create_backend`; None keeps the present one.
            **init_kwargs: keyword arguments of the new code's constructor; earlier ones are not kept.

        Raises:
            BackendNotFound: there is no such backend.
            TypeError, ConfigError, BackendError: see `create_backend`. Room for one more replica is enough.
        """
        validation.check_tag(tag)
        version = token_hex(4)
        options = validation.check_actor_options(ray_actor_options)
        environment = validation.check_runtime_env(runtime_env)
        takes_batch = validation.may_take_batches(func_or_class)
        BackendConfig().merged(config)  # Invalid fields are reported first, also for a backend that does not exist.

        def update(old: BackendRecord) -> BackendRecord:
            merged = BackendConfig.of_spec(old.config).merged(config)
            validation.check_fits(merged, func_or_class, takes_batch=takes_batch)
            return replace(
                old,
                version=version,
                config=merged.spec(),
                actor_options=old.actor_options if ray_actor_options is None else options,
                runtime_env=old.runtime_env if runtime_env is None else environment,
                accepts_batch=takes_batch,
                source=source_digest(func_or_class, old.runtime_env if runtime_env is None else environment),
            )

        code = _checked_code(func_or_class, init_args, init_kwargs, BackendConfig(), version)
        files = None if environment is None else pack(environment, version)
        self._run(self._core.update_backend(tag, update, code=code, files=files))

    @short_traceback
    def update_backend_config(self, tag: str, config: BackendConfig | Mapping[str, Any]) -> None:
        """Change the configuration of a backend; return when all replicas apply it and their number is right.

        Replicas apply it while they run, by the class's ``reconfigure`` where ``user_config`` is given.

        Args:
            tag: an existing backend.
            config: fields to change; all others stay.

        Raises:
            BackendNotFound: there is no such backend.
            TypeError, ConfigError: see `create_backend`.
            BackendError: a new replica could not start, or ``reconfigure`` raised.
        """
        validation.check_tag(tag)
        BackendConfig().merged(config)

        def update(old: BackendRecord) -> BackendRecord:
            merged = BackendConfig.of_spec(old.config).merged(config)
            validation.check_batch_size(merged, f"the code of {tag!r}", takes_batch=old.accepts_batch)
            return replace(old, config=merged.spec())

        self._run(self._core.update_backend(tag, update))

    @short_traceback
    def get_backend_config(self, tag: str) -> BackendConfig:
        """Return the configuration of a backend. Raises `BackendNotFound`."""
        validation.check_tag(tag)
        return BackendConfig.of_spec(registry_changes.backend_of(self._run(self._core.snapshot()), tag).config)

    def list_backends(self) -> dict[str, BackendConfig]:
        """Return the configuration of every backend, by tag."""
        snapshot = self._run(self._core.snapshot())
        return {tag: BackendConfig.of_spec(record.config) for tag, record in snapshot.backends.items()}

    @short_traceback
    def delete_backend(self, tag: str, force: bool = False) -> None:
        """Delete a backend and its dead letters; return when its replicas have ended.

        Queued requests are answered first, for at most its ``graceful_shutdown_timeout_s``; the rest is refused.

        Args:
            tag: an existing backend.
            force: refuse at once all queued and running requests.

        Raises:
            BackendNotFound: there is no such backend.
            ConfigError: an endpoint uses it, in its traffic or its shadow traffic.
        """
        validation.check_tag(tag)
        self._run(self._core.remove_backend(tag, drain=not force))

    # -- endpoints

    @short_traceback
    def create_endpoint(
        self,
        name: str,
        *,
        backend: str,
        route: str | None = None,
        methods: Iterable[str] = ("GET",),
        call_methods: Iterable[str] | None = None,
    ) -> None:
        """Create an endpoint, for handles and optionally for HTTP; return when every proxy serves the route.

        Args:
            name: 1 to 128 letters, digits, ``_``, ``.``, ``-`` or ``#``.
            backend: the tag of the backend that receives all requests, until `set_traffic` changes that.
            route: a path with Starlette's parameters, such as ``"/users/{id:int}"`` (``str``, ``int``, ``float``,
                ``uuid``, ``path``); None for handles only.
            methods: HTTP methods, in upper or lower case. GET includes HEAD. ``serve.ALL_METHODS`` for an application
                that chooses among them itself.
            call_methods: the methods of the backend's class that can be called through this endpoint, such as
                ``["__call__", "predict"]``; others are refused with `CallMethodRefused` (403). None allows every
                public method.

        Raises:
            BackendNotFound: there is no such backend.
            ConfigError: the endpoint exists, another endpoint has the route for one of these methods, or a value is
                not allowed.
            TypeError: an argument has the wrong type.
        """
        check_name("an endpoint", name)
        validation.check_tag(backend)
        new = EndpointRecord(
            name=name,
            route=None if route is None else check_route(route),
            methods=validation.check_methods(methods),
            traffic={backend: 1.0},
            call_methods=validation.check_call_methods(call_methods),
        )
        self._put_endpoint(new)

    def _put_endpoint(self, new: EndpointRecord) -> None:
        self._run(self._core.change(lambda snapshot: registry_changes.add_endpoint(snapshot, new)))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Return ``{name: {"route", "methods", "traffic", "shadows"}}``."""
        self._check_open()
        return super().list_endpoints()

    @short_traceback
    def delete_endpoint(self, name: str) -> None:
        """Delete an endpoint; return when no proxy serves its route. Its backends stay. Raises `EndpointNotFound`."""
        check_name("an endpoint", name)
        self._run(self._core.change(lambda snapshot: registry_changes.remove_endpoint(snapshot, name)))

    @short_traceback
    def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """Distribute an endpoint's requests over backends; return when every proxy does so.

        Args:
            endpoint: its name.
            traffic: weights by backend tag, not negative, with a sum of 1 (± 1e-6). Requests with the same shard key
                go to the same backend, as far as the weights allow.

        Raises:
            EndpointNotFound: there is no such endpoint.
            BackendNotFound: there is no such backend.
            ConfigError: a weight is negative, or the sum is not 1.
            TypeError: an argument has the wrong type.
        """
        check_name("an endpoint", endpoint)
        self._run(self._core.change(lambda snapshot: registry_changes.set_traffic(snapshot, endpoint, traffic)))

    @short_traceback
    def shadow_traffic(self, endpoint: str, tag: str, proportion: float) -> None:
        """Copy a proportion of an endpoint's requests to a backend; return when every proxy does so.

        The replies to the copies are discarded, and errors of the backend do not affect the original requests.

        Args:
            endpoint: its name.
            tag: the backend that receives the copies.
            proportion: 0 to 1; 0 ends the copying.

        Raises:
            EndpointNotFound: there is no such endpoint.
            BackendNotFound: there is no such backend.
            ConfigError: ``proportion`` is not between 0 and 1.
            TypeError: an argument has the wrong type.
        """
        check_name("an endpoint", endpoint)
        validation.check_tag(tag)
        share = validation.check_proportion(proportion)
        self._run(self._core.change(lambda snapshot: registry_changes.set_shadow(snapshot, endpoint, tag, share)))

    # -- the instance

    def status(self) -> Status:
        """Return the state of backends, endpoints, proxies and the controller: see `Status`."""
        return self._run(self._core.status())

    def wait(self) -> None:
        """Block until the process is interrupted (Ctrl-C) or the instance is shut down. For the end of a script.

        Returns in both cases. A script that ends then also ends the instance that it has started; see `close`. During
        an outage of the broker it waits on. Where a script calls this, ``penstock run`` shows the URL and the routes.
        """
        runs_at_s = time.monotonic()
        try:
            for call in before_waiting:
                call(self)
            while not self._closing_event.wait(_WAIT_POLL_S):
                try:
                    if not self._run(self._core.has_stopped()):
                        runs_at_s = time.monotonic()
                    elif time.monotonic() - runs_at_s > CONTROLLER_LOST_S:
                        return
                except BrokerUnavailable:
                    continue
                except PenstockError:
                    if self._closed:  # Another thread has closed the client during the check.
                        return
                    raise
        except KeyboardInterrupt:
            return

    def shutdown(self) -> None:
        """End the processes of the instance and delete all its keys in Redis. A second call does nothing.

        Requests that are still queued are refused. The embedded server ends, and Ray too if ``start`` started it.
        The files of a ``data_dir`` stay, without any data of the instance.

        Raises:
            PenstockError: the controller did not end in time.
            BrokerUnavailable: Redis cannot be reached.
        """
        self._disconnect(end=True, erase=True)

    def close(self) -> None:
        """Disconnect; also end the instance if this client started it and it is not detached.

        Called at the end of a ``with`` statement and of the script. The end is that of `shutdown`, except that an
        instance with a ``data_dir`` keeps its keys and can be resumed.
        """
        self._disconnect(end=self._owns, erase=not self._keep)

    def __enter__(self) -> Client:
        return self

    def _disconnect(self, *, end: bool, erase: bool) -> None:
        if os.getpid() != self._process:
            return  # A forked child owns neither the connections nor the instance.
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._closing_event.set()
        atexit.unregister(self.close)
        with self._started:
            try:
                if end:
                    background_loop.run(self._core.end(erase=erase))
                else:
                    wait_until_queued(self.redis_url, self.instance, CLOSE_TIMEOUT_S)
            finally:
                background_loop.run(self._core.close())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_open()
            if (here := os.getpid()) != self._process:
                raise PenstockError(
                    f"this client belongs to process {self._process}, from which this process, {here}, was forked: "
                    "serve.connect() makes one for this process"
                )
        except PenstockError:
            coroutine.close()
            raise
        return background_loop.run(coroutine)

    def _check_open(self) -> None:
        if self._closed:
            raise PenstockError(f"this client of the instance {self.instance!r} is closed")


def _checked_code(
    func_or_class: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: BackendConfig, version: str
) -> bytes:
    """Return the pickled code with its arguments, after checks that it can serve."""
    takes_batch = validation.may_take_batches(func_or_class)
    validation.check_callable(func_or_class, args, kwargs, takes_batch=takes_batch)
    validation.check_fits(config, func_or_class, takes_batch=takes_batch)
    try:
        blob = dump(func_or_class, args, kwargs)
    except Exception as e:  # Pickling runs code of the objects.
        hint = ": an ASGI application can be given by its import path" * isinstance(func_or_class, AsgiApplication)
        raise TypeError(f"a backend's code and arguments must be picklable: {e}{hint}") from e
    # Bytes behind a pickle are ignored when it is read. They make the digest of each version unique, so that deleting
    # the code of one backend does not delete that of another with the same code.
    return blob + version.encode()
