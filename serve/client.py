"""The client: the sync API of an instance."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from secrets import token_hex
from typing import Any, TypeVar

from ..broker.errors import PenstockError
from ..broker.registry.records import BackendRecord, EndpointRecord
from ..broker.transport.url import shown_url
from ..broker.wire.keys import check_name
from ..handles import background_loop
from ..handles.connection import CLOSE_TIMEOUT_S, Connection, wait_until_queued
from ..proxy.routing import check_route
from ..workers.executing.accept_batch import accepts_batch
from ..workers.executing.user_code import dump
from ..workers.runtime_env import pack
from . import registry_changes, validation
from .config import BackendConfig
from .instance import Instance
from .status import Status

log = logging.getLogger(__name__)

T = TypeVar("T")

Target = Callable[..., Any] | str
"""What can be deployed: a function, a class, or where to import either."""


class Client(Connection):
    """One instance: its backends, its endpoints, its handles, its end.

    ``serve.start`` and ``serve.connect`` make it. Its methods block, and may be called from any thread. Those that
    change something return when the change serves; when they raise, they have changed nothing.

    Leaving it as a context manager ends what ``serve.start`` has started, unless that is detached.

    It belongs to the process that made it. In a forked child only its handles, batches and dead letters are of use; the
    end of the child ends nothing.
    """

    def __init__(
        self, core: Instance, http_url: str | None, *, started: ExitStack | None = None, owns: bool, keep: bool
    ) -> None:
        """``started`` undoes what ``start`` did. Who ``owns`` the instance ends it, and may ``keep`` its keys."""
        super().__init__(core.redis_url, core.name)
        self._core = core
        self._http_url = http_url
        self._started = started or ExitStack()
        self._owns, self._keep = owns, keep
        self._closed = False
        self._closing = threading.Lock()
        self._process = os.getpid()
        if owns:
            atexit.register(self.close)

    @property
    def http_url(self) -> str | None:
        """Where HTTP clients find it, such as ``"http://127.0.0.1:8000"``; None if it has no server."""
        return self._http_url

    def __repr__(self) -> str:
        closed = ", shut down" if self._closed else ""
        return f"Client({self.instance!r}, redis_url={shown_url(self.redis_url)!r}, http_url={self.http_url!r}{closed})"

    # -- backends

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
        """Deploy code; return when all its replicas are ready.

        There is no limit to how long they may take to start.

        Args:
            tag: its name: 1 to 128 letters, digits, ``_``, ``.``, ``-`` or ``#``.
            func_or_class: a function of one `Request`, ``async def`` or not; a class whose instances are called with
                one; or where the replicas can import either, as ``"package.module:Name"``. With `accept_batch`, it
                takes a list of requests and returns a list of as many results.
            *init_args: what a class is constructed with, in each replica. It travels by pickle.
            config: a `BackendConfig`, or a dict of its fields.
            ray_actor_options: what each replica needs: ``num_cpus`` (1 unless given), ``num_gpus``, ``memory``
                (bytes), ``resources``, ``accelerator_type``.
            runtime_env: Ray's, for the replicas: environment variables, working directory, packages. What
                ``working_dir`` and ``py_modules`` name may also be a directory of this machine: it travels as it is
                now, up to 128 MiB, without what ``excludes``, ``.gitignore`` and ``.rayignore`` name. A module is
                imported by the name of its directory.
            **init_kwargs: see ``init_args``.

        Raises:
            TypeError: an argument is of the wrong type, the code does not take one request, its constructor does not
                take what was given, or something cannot be pickled.
            ConfigError: there is such a backend already, a value cannot be, the code with its arguments is larger than
                Redis takes (512 MiB), or the cluster does not have what all its replicas need; the message says what
                was asked for and what there is.
            BackendError: a replica could not start; its ``traceback`` is that of the constructor.
        """
        validation.check_tag(tag)
        checked = BackendConfig.of(config)
        record = BackendRecord(
            tag=tag,
            version=token_hex(4),
            code="",
            config=checked.spec(),
            actor_options=validation.check_actor_options(ray_actor_options),
            runtime_env=validation.check_runtime_env(runtime_env),
            accepts_batch=_may_take_batches(func_or_class),
        )
        code = _checked_code(func_or_class, init_args, init_kwargs, checked, record.version)
        files = pack(record.runtime_env or {}, record.version)
        self._run(self._core.add_backend(record, code, files))

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
        """Roll out new code in place of a backend's; return when no replica of the old takes requests any more.

        An old replica goes when a new one is ready, so that there are never fewer than are wanted; it finishes what
        it has begun. If the new code cannot start, the old stays.

        Args:
            tag: an existing backend.
            func_or_class: see `create_backend`, as for all others.
            *init_args: of the new code; the old ones are not kept.
            config: what is to change; fields that it does not name stay as they are.
            ray_actor_options: None keeps them.
            runtime_env: None keeps it.
            **init_kwargs: of the new code; the old ones are not kept.

        Raises:
            BackendNotFound: there is no such backend.
            TypeError, ConfigError, BackendError: see `create_backend`. One free place in the cluster is enough.
        """
        validation.check_tag(tag)
        version = token_hex(4)
        options = validation.check_actor_options(ray_actor_options)
        environment = validation.check_runtime_env(runtime_env)
        takes_batch = _may_take_batches(func_or_class)
        BackendConfig().merged(config)  # what is wrong in itself is told first, whatever there is

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
            )

        code = _checked_code(func_or_class, init_args, init_kwargs, BackendConfig(), version)
        files = None if environment is None else pack(environment, version)
        self._run(self._core.update_backend(tag, update, code=code, files=files))

    def update_backend_config(self, tag: str, config: BackendConfig | Mapping[str, Any]) -> None:
        """Change how a backend runs; return when all its replicas do so, and there are as many as are wanted.

        Args:
            tag: an existing backend.
            config: what is to change; fields that it does not name stay as they are.

        Raises:
            BackendNotFound: there is no such backend.
            TypeError, ConfigError: see `create_backend`.
            BackendError: a new replica could not start, or the class's ``reconfigure`` raised.
        """
        validation.check_tag(tag)
        BackendConfig().merged(config)

        def update(old: BackendRecord) -> BackendRecord:
            merged = BackendConfig.of_spec(old.config).merged(config)
            validation.check_batch_size(merged, f"the code of {tag!r}", takes_batch=old.accepts_batch)
            return replace(old, config=merged.spec())

        self._run(self._core.update_backend(tag, update))

    def get_backend_config(self, tag: str) -> BackendConfig:
        """Return how a backend runs. Raises `BackendNotFound`."""
        validation.check_tag(tag)
        return BackendConfig.of_spec(registry_changes.backend_of(self._run(self._core.snapshot()), tag).config)

    def list_backends(self) -> dict[str, BackendConfig]:
        """Return every backend's configuration, by tag."""
        seen = self._run(self._core.snapshot())
        return {tag: BackendConfig.of_spec(record.config) for tag, record in seen.backends.items()}

    def delete_backend(self, tag: str, force: bool = False) -> None:
        """Delete a backend, with its dead letters; return when its replicas have ended.

        What is queued is answered first, for at most its ``graceful_shutdown_timeout_s``; the rest is refused.

        Args:
            tag: an existing backend.
            force: True to refuse at once what is queued, and what runs too.

        Raises:
            BackendNotFound: there is no such backend.
            ConfigError: an endpoint sends or shadows to it.
        """
        validation.check_tag(tag)
        self._run(self._core.remove_backend(tag, drain=not force))

    # -- endpoints

    def create_endpoint(
        self,
        name: str,
        *,
        backend: str,
        route: str | None = None,
        methods: Iterable[str] = ("GET",),
        call_methods: Iterable[str] | None = None,
    ) -> None:
        """Let a backend be called, by handles and over HTTP; return when every proxy serves the route.

        Args:
            name: 1 to 128 letters, digits, ``_``, ``.``, ``-`` or ``#``.
            backend: the tag of the backend that gets all its requests, until `set_traffic`.
            route: a path with Starlette's parameters, such as ``"/users/{id:int}"`` (``str``, ``int``, ``float``,
                ``uuid``, ``path``); None for handles alone.
            methods: HTTP's, in any case. GET brings HEAD along.
            call_methods: the methods of the backend's class that can be called through this endpoint, such as
                ``["__call__", "predict"]``; others are refused with `CallMethodRefused` (403). None: every public one.

        Raises:
            BackendNotFound: there is no such backend.
            ConfigError: there is such an endpoint already, another one has the route for one of these methods, or a
                value cannot be.
            TypeError: an argument is of the wrong type.
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
        self._run(self._core.change(lambda seen: registry_changes.add_endpoint(seen, new)))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Return ``{name: {"route", "methods", "traffic", "shadows"}}``."""
        self._check_open()
        return super().list_endpoints()

    def delete_endpoint(self, name: str) -> None:
        """Delete an endpoint; return when no proxy serves its route. Its backends stay. Raises `EndpointNotFound`."""
        check_name("an endpoint", name)
        self._run(self._core.change(lambda seen: registry_changes.remove_endpoint(seen, name)))

    def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """Share out an endpoint's requests among backends; return when every proxy does so.

        Args:
            endpoint: its name.
            traffic: weights by backend: not negative, their sum 1 within a millionth. Requests with the same shard
                key go to the same backend, as far as the weights allow.

        Raises:
            EndpointNotFound: there is no such endpoint.
            BackendNotFound: there is no such backend.
            ConfigError: a weight is negative, or they do not sum to 1.
            TypeError: an argument is of the wrong type.
        """
        check_name("an endpoint", endpoint)
        self._run(self._core.change(lambda seen: registry_changes.set_traffic(seen, endpoint, traffic)))

    def shadow_traffic(self, endpoint: str, tag: str, proportion: float) -> None:
        """Copy a part of an endpoint's requests to a backend; return when every proxy does so.

        Nobody waits for what it answers, and its failures touch nobody.

        Args:
            endpoint: its name.
            tag: the backend that gets the copies.
            proportion: 0 to 1; 0 ends it.

        Raises:
            EndpointNotFound: there is no such endpoint.
            BackendNotFound: there is no such backend.
            ConfigError: ``proportion`` is not 0 to 1.
            TypeError: an argument is of the wrong type.
        """
        check_name("an endpoint", endpoint)
        validation.check_tag(tag)
        share = validation.check_proportion(proportion)
        self._run(self._core.change(lambda seen: registry_changes.set_shadow(seen, endpoint, tag, share)))

    # -- the whole

    def status(self) -> Status:
        """Return how the instance is doing: see `Status`. Printed, it is a table."""
        status = self._run(self._core.status())
        status["endpoints"] = self.list_endpoints()
        return status

    def shutdown(self) -> None:
        """End the instance: all its processes, and every key that it has in Redis. A second time does nothing.

        Requests that are still queued are refused. What ``start`` has brought up for it ends too: the embedded
        server, and a Ray that was not running before. The files of a ``data_dir`` stay, with nothing of the instance
        in them.
        """
        self._disconnect(end=True, erase=True)

    def close(self) -> None:
        """End what ``serve.start`` has started, unless that is detached; disconnect in any case.

        So ends a ``with`` statement, and the script. It is `shutdown`, but for an instance with a ``data_dir``, which
        can be resumed.
        """
        self._disconnect(end=self._owns, erase=not self._keep)

    def __enter__(self) -> Client:
        return self

    def _disconnect(self, *, end: bool, erase: bool) -> None:
        if os.getpid() != self._process:
            return  # what it holds is not ours, nor is the instance
        with self._closing:
            if self._closed:
                return
            self._closed = True
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
                    f"this client belongs to the process {self._process}, which the process {here} was forked from: "
                    "serve.connect() makes one of its own"
                )
        except PenstockError:
            coroutine.close()
            raise
        return background_loop.run(coroutine)

    def _check_open(self) -> None:
        if self._closed:
            raise PenstockError(f"this client of the instance {self.instance!r} was shut down")


def _may_take_batches(func_or_class: object) -> bool:
    # What only the workers can import is for them to refuse.
    return isinstance(func_or_class, str) or accepts_batch(func_or_class)


def _checked_code(
    func_or_class: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: BackendConfig, version: str
) -> bytes:
    """Return the code as it travels, if it could serve."""
    takes_batch = _may_take_batches(func_or_class)
    validation.check_callable(func_or_class, args, kwargs, takes_batch=takes_batch)
    validation.check_fits(config, func_or_class, takes_batch=takes_batch)
    try:
        blob = dump(func_or_class, args, kwargs)
    except Exception as e:  # pickling runs whatever code the objects bring
        raise TypeError(f"a backend's code and arguments must be picklable: {e}") from e
    # Bytes behind a pickle are ignored. They make each version's digest its own, so that whoever deletes his code
    # cannot delete that of another backend with the same.
    return blob + version.encode()
