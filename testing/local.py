"""A backend in the process of a test: with its handles and its HTTP, without Ray and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

from starlette.types import ASGIApp, Receive, Scope, Send

from ..broker.errors import PenstockError
from ..broker.registry.records import BackendRecord, EndpointRecord, Snapshot
from ..broker.wire.keys import Keys
from ..handles._tracebacks import short_traceback
from ..handles.async_handle import AsyncServeHandle
from ..handles.calls.request_client import Links
from ..handles.calls.shared_client import SharedClient, open_clients, provide_links
from ..handles.handle import ServeHandle
from ..proxy.app import App
from ..proxy.middleware import wrap
from ..proxy.options import ProxyOptions
from ..proxy.routing import check_route
from ..serve import validation
from ..serve.client import Target
from ..serve.config import BackendConfig, HTTPOptions
from ..workers.asgi.application import AsgiApplication
from ..workers.executing.user_code import LoadedCode, dump
from .local_client import local_links
from .local_queue import LocalQueue
from .local_replica import LocalReplica

NAME = "local"
"""Name of the instance, the backend and the endpoint."""


@short_traceback
def local(
    func_or_class: Target,
    *init_args: Any,
    config: BackendConfig | Mapping[str, Any] | None = None,
    route: str = "/",
    methods: Iterable[str] = ("GET", "POST"),
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    **init_kwargs: Any,
) -> Local:
    """Serve code in this process; return when it is constructed.

    It has one replica. Requests pass through the same validation, admission, batching, execution and conversion as in
    an instance. The code and its arguments are used as they are and not pickled, so that a test can replace parts of
    them and look at them afterwards. Nothing is durable: what needs Redis or Ray is refused or has no effect.

    Args:
        func_or_class: as for ``Client.create_backend``: a function, a class, ``serve.asgi(app)``, or an import path.
        *init_args: arguments of the class's constructor.
        config: a `BackendConfig`, or a dict of its fields. The number of replicas and the health checks have no effect.
        route: the route of the endpoint, as for ``Client.create_endpoint``.
        methods: its HTTP methods.
        http_options: `HTTPOptions`, or a dict of its fields: ``middlewares``, ``request_timeout_s``,
            ``max_body_bytes``, ``root_path`` and ``debug``. The others have no effect.
        **init_kwargs: keyword arguments of the class's constructor.

    Raises:
        TypeError, ConfigError: as for ``Client.create_backend`` and ``Client.create_endpoint``.
        BackendError: the code cannot be imported, constructed or configured; the error has its traceback.
    """
    checked = BackendConfig.parse(config)
    takes_batch = validation.may_take_batches(func_or_class)
    validation.check_callable(func_or_class, init_args, init_kwargs, takes_batch=takes_batch)
    validation.check_fits(checked, func_or_class, takes_batch=takes_batch)
    endpoint = EndpointRecord(
        name=NAME,
        route=check_route(route),
        methods=validation.check_methods(methods),
        traffic={NAME: 1.0},
    )
    if isinstance(func_or_class, str) or (isinstance(func_or_class, AsgiApplication) and func_or_class.is_path):
        code: bytes | LoadedCode = dump(func_or_class, init_args, init_kwargs)
    else:
        code = LoadedCode(func_or_class, init_args, init_kwargs)
    return Local(code, checked, endpoint, HTTPOptions.parse(http_options))


class Local:
    """A backend in this process. Made by `local`; as a context manager it calls `close`.

    It is an ASGI application, for ``httpx.ASGITransport``, for Starlette's ``TestClient``, or for an HTTP server.
    """

    def __init__(
        self, code: bytes | LoadedCode, config: BackendConfig, endpoint: EndpointRecord, http: HTTPOptions
    ) -> None:
        # The URL of a Redis that does not exist: it names this object, and nothing connects to it.
        self._url = f"unix:///penstock.testing/{token_hex(8)}"
        self._keys, self._queue = Keys(NAME), LocalQueue()
        self._config, self._endpoint, self._http = config, endpoint, http
        self._is_closed = False
        self._apps: WeakKeyDictionary[asyncio.AbstractEventLoop, ASGIApp] = WeakKeyDictionary()
        self._replica = LocalReplica(self._url, self._keys, NAME, code, config.spec(), self._queue)
        provide_links(self._url, NAME, self._make_links)

    def __repr__(self) -> str:
        return f"<penstock.testing.Local {self._endpoint.route!r}{', closed' if self._is_closed else ''}>"

    @property
    def handle(self) -> ServeHandle:
        """A handle for threads: ``local.handle.remote(1).result()``."""
        return ServeHandle(self._url, NAME, NAME)

    @property
    def async_handle(self) -> AsyncServeHandle:
        """A handle for asyncio: ``await (await local.async_handle.remote(1))``."""
        return AsyncServeHandle(self._url, NAME, NAME)

    @property
    def app(self) -> ASGIApp:
        """The ASGI application that serves the route; the object itself is the same."""
        return self

    def reconfigure(self, config: BackendConfig | Mapping[str, Any]) -> None:
        """Change fields of the configuration, as ``Client.update_backend_config``.

        Raises:
            TypeError, ConfigError: a field has a wrong type or value.
            BackendError: the user's ``reconfigure`` raised; the old configuration stays.
        """
        merged = self._config.merged(config)
        self._replica.reconfigure(merged.spec())
        self._config = merged

    def check_health(self) -> None:
        """Call the code's ``check_health``, if there is one. Raises `BackendError` if it fails."""
        self._replica.check_health()

    def close(self) -> None:
        """Finish the requests that run, for at most ``graceful_shutdown_timeout_s``, and end. Idempotent.

        Blocks. Requests that are still queued, and those that run longer, end with `RequestCancelled`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._replica.close(self._config.graceful_shutdown_timeout_s)
        here = asyncio._get_running_loop()
        for client in open_clients(self._url, NAME):
            if client.loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(client.close(), client.loop)
                if client.loop is not here:
                    closing.result()

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as the proxies of an instance do."""
        app = self._apps.get(asyncio.get_running_loop())
        if app is None:
            app = await self._new_app()
        await app(scope, receive, send)

    async def _new_app(self) -> ASGIApp:
        options = ProxyOptions.from_fields(self._http.model_dump(exclude={"middlewares"}))
        inner = App(
            await SharedClient.get(self._url, NAME),
            max_body_bytes=options.max_body_bytes,
            request_timeout_s=options.request_timeout_s,
            root_path=options.root_path,
            debug=options.debug,
        )
        app = self._apps[asyncio.get_running_loop()] = wrap(inner, self._http.middlewares)
        return app

    def _make_links(self) -> Links:
        if self._is_closed:
            raise PenstockError("this penstock.testing.local was closed: make another one for further requests")
        record = BackendRecord(tag=NAME, version=NAME, code="", config=self._config.spec())
        snapshot = Snapshot(backends={NAME: record}, endpoints={NAME: self._endpoint})
        return local_links(self._url, self._keys, snapshot, self._queue)
