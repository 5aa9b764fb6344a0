"""Connection of a client process to an instance, by its Redis URL. Needs no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Literal, overload

from ..broker.defaults import default_instance, needed_url
from ..broker.registry.records import Snapshot
from ..broker.transport.url import shown_url
from ..broker.wire.kept import RequestStatus
from ..broker.wire.keys import check_name
from ..runtime.notebooks import NotebookTable
from . import background_loop
from ._tracebacks import short_traceback
from .async_handle import AsyncServeHandle
from .batch.producer import JOB_TTL_S, BatchProducer
from .calls.shared_client import SharedClient, starting_tasks
from .calls.submitted import AsyncSubmitted, Submitted
from .dead_letters import DeadLetters
from .errors import ConfigError, EndpointNotFound, PenstockError
from .handle import ServeHandle, warn_about_face

log = logging.getLogger(__name__)


CLOSE_TIMEOUT_S = 10.0
"""Default of ``close_timeout_s``."""


@short_traceback
def connect(
    redis_url: str | None = None, instance: str | None = None, *, close_timeout_s: float = CLOSE_TIMEOUT_S
) -> Connection:
    """Connect to an instance. Needs no Ray, and starts nothing of the instance.

    Args:
        redis_url: the Redis URL: ``redis://``, ``rediss://``, ``unix://`` or ``redis+sentinel://``. By default that of
            the surrounding backend when called inside one, otherwise the value of ``PENSTOCK_REDIS_URL``.
        instance: name of the instance, as given to ``serve.start``. By default that of the surrounding backend when
            called inside one, otherwise the value of ``PENSTOCK_INSTANCE``, or ``"default"``.
        close_timeout_s: the most seconds for which `Connection.close`, and the end of a ``with`` block, wait until all
            calls are durably queued.

    Raises:
        TypeError: an argument has the wrong type.
        ConfigError: there is no URL or it is not a Redis URL; ``instance`` is not a name; ``close_timeout_s`` is
            negative.
        BrokerUnavailable: Redis cannot be reached, or rejected the login.
        NotPermitted: the Redis user of the URL lacks a permission that callers need.
    """
    url = needed_url(redis_url)
    connection = Connection(url, default_instance() if instance is None else instance, close_timeout_s)
    connection.open()
    return connection


class Connection(NotebookTable):
    """A connection to one instance: it creates handles and batch producers, and shows dead letters and endpoints.

    Made by `connect`. Its methods block, and can be called from any thread. As a context manager it calls `close`.
    """

    def __init__(self, redis_url: str, instance: str, close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Create a connection that is not open; see `connect` for the arguments."""
        if isinstance(close_timeout_s, bool) or not isinstance(close_timeout_s, int | float):
            raise TypeError(f"close_timeout_s must be a number of seconds, not {type(close_timeout_s).__name__}")
        if not 0 <= close_timeout_s <= 1e9:
            raise ConfigError(f"close_timeout_s must be 0 to 1e9 seconds, not {close_timeout_s}")
        self.redis_url, self.instance = redis_url, instance
        self._close_timeout_s = float(close_timeout_s)
        self._client: SharedClient | None = None
        """The shared client that this connection keeps open, from `open` to `close`."""

    def __repr__(self) -> str:
        return f"Connection({shown_url(self.redis_url)!r}, instance={self.instance!r})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"redis_url": shown_url(self.redis_url), "instance": self.instance}

    def open(self) -> None:
        """Connect. Raises what `connect` raises."""
        background_loop.run(self._open())

    async def _open(self) -> None:
        async with SharedClient.using(self.redis_url, self.instance) as client:
            await client.registry.snapshot()
            if self._client is None:
                client.add_user()
                self._client = client

    @overload
    def get_handle(self, endpoint: str, *, sync: Literal[True] = True, missing_ok: bool = False) -> ServeHandle: ...
    @overload
    def get_handle(self, endpoint: str, *, sync: Literal[False], missing_ok: bool = False) -> AsyncServeHandle: ...
    @overload
    def get_handle(self, endpoint: str, *, sync: bool, missing_ok: bool = False) -> ServeHandle | AsyncServeHandle: ...

    @short_traceback
    def get_handle(
        self, endpoint: str, *, sync: bool = True, missing_ok: bool = False
    ) -> ServeHandle | AsyncServeHandle:
        """Return a handle for calls to ``endpoint``.

        Args:
            endpoint: name of the endpoint.
            sync: True for a handle whose futures are ``concurrent.futures.Future``, False for one whose futures are
                awaited. A warning tells when the other one fits better: whether an event loop runs in this thread.
            missing_ok: whether the endpoint may be created later. A call waits for it until the call's deadline, or for
                30 s without one.

        Raises:
            TypeError: an argument has the wrong type.
            ConfigError: ``endpoint`` is not a name.
            EndpointNotFound: the endpoint does not exist, and ``missing_ok`` is False.
            BrokerUnavailable: Redis cannot be reached.
        """
        for name, value in (("sync", sync), ("missing_ok", missing_ok)):
            if type(value) is not bool:
                raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
        kind = ServeHandle if sync else AsyncServeHandle
        handle = kind(self.redis_url, self.instance, endpoint, None, missing_ok)
        if not missing_ok and endpoint not in (known := self.list_endpoints()):
            raise EndpointNotFound(endpoint, known)
        warn_about_face(sync, stacklevel=3)
        return handle

    @short_traceback
    def batch(
        self,
        endpoint: str,
        *,
        window: int | None = None,
        timeout_s: float | None = None,
        method_name: str = "__call__",
        shard_key: str | None = None,
        job: str | None = None,
        job_ttl_s: float = JOB_TTL_S,
        restart_job: bool = False,
        retry_errors: bool = False,
    ) -> BatchProducer:
        """Return a producer that sends any number of items through ``endpoint``, behind its interactive requests.

        See `BatchProducer` for the arguments.

        Raises:
            TypeError: an argument has the wrong type.
            ConfigError: an argument has a value that is not allowed.
            EndpointNotFound: the endpoint does not exist.
            BrokerUnavailable: Redis cannot be reached.
        """
        producer = BatchProducer(
            self.redis_url,
            endpoint,
            instance=self.instance,
            window=window,
            timeout_s=timeout_s,
            method_name=method_name,
            shard_key=shard_key,
            job=job,
            job_ttl_s=job_ttl_s,
            restart_job=restart_job,
            retry_errors=retry_errors,
        )
        if endpoint not in (known := self.list_endpoints()):
            raise EndpointNotFound(endpoint, known)
        return producer

    @overload
    def submitted(self, request_id: str, *, sync: Literal[True] = True) -> Submitted: ...
    @overload
    def submitted(self, request_id: str, *, sync: Literal[False]) -> AsyncSubmitted: ...

    def submitted(self, request_id: str, *, sync: bool = True) -> Submitted | AsyncSubmitted:
        """Return the submitted request with that id. Its methods raise `RequestNotFound` if there is none.

        Args:
            request_id: its id, from `Submitted.id` or from HTTP.
            sync: False for an object whose methods are awaited.

        Raises:
            TypeError: ``request_id`` is not a ``str``.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"the id of a submitted request must be a str, not {type(request_id).__name__}")
        return (Submitted if sync else AsyncSubmitted)(self.redis_url, self.instance, request_id)

    def submitted_requests(self, endpoint: str) -> list[RequestStatus]:
        """Return the statuses of the submitted requests of an endpoint, and of those with a key, oldest first.

        It scans all keys of the Redis (``SCAN``), which needs the rights of the owner of the instance.

        Args:
            endpoint: name of the endpoint.

        Raises:
            EndpointNotFound: there is no such endpoint.
            NotPermitted: the Redis user may not scan the keys.
            BrokerUnavailable: Redis cannot be reached.
        """
        return background_loop.run(self._submitted_requests(endpoint))

    async def _submitted_requests(self, endpoint: str) -> list[RequestStatus]:
        async with SharedClient.using(self.redis_url, self.instance) as client:
            snapshot = await client.registry.snapshot()
            if endpoint not in snapshot.endpoints:
                raise EndpointNotFound(endpoint, snapshot.endpoints)
            # Of all backends: the traffic may have been another one when they were submitted.
            found = [status for tag in snapshot.backends for status in await client.kept.statuses(tag)]
        return sorted((one for one in found if one.endpoint == endpoint), key=lambda one: one.created)

    @short_traceback
    def dead_letters(self, tag: str) -> DeadLetters:
        """Return the dead letters of the backend ``tag``.

        Raises:
            TypeError, ConfigError: ``tag`` is not a name.
        """
        return DeadLetters(self.redis_url, self.instance, check_name("a backend", tag))

    @short_traceback
    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Return the endpoints: ``{name: {"route", "methods", "traffic", "shadows"}}``.

        An endpoint that was created with ``call_methods`` has these too.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        return background_loop.run(self._list_endpoints())

    async def _list_endpoints(self) -> dict[str, dict[str, Any]]:
        async with SharedClient.using(self.redis_url, self.instance) as client:
            # From Redis: the client's snapshot follows the registry with a short delay.
            return describe_endpoints(await client.registry.snapshot())

    def close(self) -> None:
        """Wait until all calls of sync handles to this instance are durably queued, then close the connection.

        No call is cancelled: futures that are read later get their results. The sync handles of the process share the
        connection; it is closed when its last user has left and no call is in flight. A handle that is used after that
        connects again.

        Raises:
            PenstockError: some calls were not queued within ``close_timeout_s``. They are queued later if the process
                lives on, and lost if it ends.
        """
        self._close()

    def _close(self) -> None:
        try:
            wait_until_queued(self.redis_url, self.instance, self._close_timeout_s)
        finally:
            background_loop.run(self._leave())

    async def _leave(self) -> None:
        kept, self._client = self._client, None
        if kept is not None:
            kept.remove_user()
        client = SharedClient.find(self.redis_url, self.instance)
        if client is not None:
            await client.leave()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()  # a subclass may close more
        except PenstockError as e:
            if error is None:
                raise
            log.warning("%s", e)  # the error that ended the block is raised


def describe_endpoints(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Return the endpoints as `Connection.list_endpoints` shows them."""
    return {
        name: {
            "route": endpoint.route,
            "methods": list(endpoint.methods),
            "traffic": dict(endpoint.traffic),
            "shadows": dict(endpoint.shadows),
            **({} if endpoint.call_methods is None else {"call_methods": list(endpoint.call_methods)}),
        }
        for name, endpoint in snapshot.endpoints.items()
    }


def wait_until_queued(url: str, instance: str, timeout_s: float) -> None:
    """Wait until all calls of this process's sync handles are durably queued or refused.

    Raises:
        PenstockError: some calls were neither within ``timeout_s`` seconds.
    """
    if late := background_loop.run(_count_unqueued(url, instance, timeout_s)):
        raise PenstockError(
            f"{late} calls to {shown_url(url)} were not queued within close_timeout_s={timeout_s:g}, and are lost if "
            "this process ends now: wait for their futures, or give a longer close_timeout_s"
        )


async def _count_unqueued(url: str, instance: str, timeout_s: float) -> int:
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    late = 0
    if tasks := starting_tasks(url, instance):
        _, waiting = await asyncio.wait(tasks, timeout=timeout_s)
        late = len(waiting)
    client = SharedClient.find(url, instance)
    if client is not None:
        late += await client.wait_until_queued(max(0.0, ends_s - loop.time()))
    return late
