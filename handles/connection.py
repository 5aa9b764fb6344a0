"""The connection of a thin client to an instance, by its Redis URL."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal, overload

from ..broker.defaults import default_instance, needed_url
from ..broker.transport.url import shown_url
from ..broker.wire.keys import check_name
from . import background_loop
from .batch.producer import JOB_TTL_S, BatchProducer
from .calls.shared_client import SharedClient, starting_tasks
from .dead_letters import DeadLetters
from .errors import ConfigError, EndpointNotFound, PenstockError
from .handle import AsyncServeHandle, ServeHandle, warn_of_the_other_face

log = logging.getLogger(__name__)


CLOSE_TIMEOUT_S = 10.0


def connect(
    redis_url: str | None = None, instance: str | None = None, *, close_timeout_s: float = CLOSE_TIMEOUT_S
) -> Connection:
    """Return the instance of that name on that Redis. Needs no Ray, and runs nothing of it.

    Args:
        redis_url: ``redis://``, ``rediss://`` or ``unix://``. Without it, inside a backend that of the backend's
            instance, elsewhere ``PENSTOCK_REDIS_URL``.
        instance: as given to ``serve.start``. Without it, inside a backend that of the backend, elsewhere
            ``PENSTOCK_INSTANCE``, or ``"default"``.
        close_timeout_s: the longest time, in seconds, that `Connection.close` and the end of a ``with`` block wait
            until all calls are durably queued.

    Raises:
        TypeError: ``close_timeout_s`` is not a number.
        ConfigError: there is no URL, or it is no Redis URL; ``instance`` is no name of one; ``close_timeout_s`` is
            negative.
        BrokerUnavailable: Redis cannot be reached, or does not let us in.
        NotPermitted: its rules do not let the user of the URL do what callers do.
    """
    url = needed_url(redis_url)
    connected = Connection(url, default_instance() if instance is None else instance, close_timeout_s)
    connected.open()
    return connected


class Connection:
    """An instance, as its callers see it."""

    def __init__(self, redis_url: str, instance: str, close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        if isinstance(close_timeout_s, bool) or not isinstance(close_timeout_s, int | float):
            raise TypeError(f"close_timeout_s must be a number of seconds, not {type(close_timeout_s).__name__}")
        if not 0 <= close_timeout_s <= 1e9:
            raise ConfigError(f"close_timeout_s must be 0 to 1e9 seconds, not {close_timeout_s}")
        self.redis_url, self.instance = redis_url, instance
        self._close_timeout_s = float(close_timeout_s)
        self._caller: SharedClient | None = None
        """The one that this keeps open, until `close`."""

    def open(self) -> None:
        """Connect. Raises what `connect` does."""
        background_loop.run(self._open())

    async def _open(self) -> None:
        async with SharedClient.using(self.redis_url, self.instance) as caller:
            await caller.registry.snapshot()
            if self._caller is None:
                caller.add_user()
                self._caller = caller

    @overload
    def get_handle(self, endpoint: str, *, sync: Literal[True] = True, missing_ok: bool = False) -> ServeHandle: ...
    @overload
    def get_handle(self, endpoint: str, *, sync: Literal[False], missing_ok: bool = False) -> AsyncServeHandle: ...
    @overload
    def get_handle(self, endpoint: str, *, sync: bool, missing_ok: bool = False) -> ServeHandle | AsyncServeHandle: ...

    def get_handle(
        self, endpoint: str, *, sync: bool = True, missing_ok: bool = False
    ) -> ServeHandle | AsyncServeHandle:
        """Return a handle to call ``endpoint`` with.

        Args:
            endpoint: its name.
            sync: True for a handle whose futures are ``concurrent.futures.Future``; False for one to await. Each warns
                when it is asked for in the other's place.
            missing_ok: True for an endpoint that may be created later: a call waits for it until its deadline, 30 s
                without one.

        Raises:
            TypeError: ``endpoint`` is not a ``str``, or another argument no ``bool``.
            EndpointNotFound: there is none of that name, and ``missing_ok`` is False.
            BrokerUnavailable: Redis cannot be reached.
        """
        for name, value in (("sync", sync), ("missing_ok", missing_ok)):
            if type(value) is not bool:
                raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
        kind = ServeHandle if sync else AsyncServeHandle
        handle = kind(self.redis_url, self.instance, endpoint, None, missing_ok)
        if not missing_ok and endpoint not in (known := self.list_endpoints()):
            raise EndpointNotFound(endpoint, known)
        warn_of_the_other_face(sync)
        return handle

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
        """Return what sends any number of items through ``endpoint``, behind its interactive requests.

        For the arguments see `BatchProducer`.

        Raises:
            TypeError: an argument is of the wrong type.
            ConfigError: a value cannot be.
            EndpointNotFound: there is none of that name.
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

    def dead_letters(self, tag: str) -> DeadLetters:
        """Return the requests of a backend that nobody could serve.

        Raises:
            TypeError, ConfigError: ``tag`` cannot be that of a backend.
        """
        return DeadLetters(self.redis_url, self.instance, check_name("a backend", tag))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Return ``{name: {"route", "methods", "traffic", "shadows"}}``. Raises `BrokerUnavailable`.

        An endpoint that was created with ``call_methods`` has these too.
        """
        return background_loop.run(self._list_endpoints())

    async def _list_endpoints(self) -> dict[str, dict[str, Any]]:
        async with SharedClient.using(self.redis_url, self.instance) as caller:
            # Asked of Redis, not of the watcher, which may be a moment behind.
            endpoints = (await caller.registry.snapshot()).endpoints
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(endpoint.traffic),
                "shadows": dict(endpoint.shadows),
                **({} if endpoint.call_methods is None else {"call_methods": list(endpoint.call_methods)}),
            }
            for name, endpoint in endpoints.items()
        }

    def close(self) -> None:
        """Wait until what was called through sync handles is durably queued, and let go of the connection.

        Nothing is given up: calls that are queued are answered, also into futures that are read later. The connection
        is shared by all sync handles of the process; the last of its users closes it, once nothing is in flight. A
        handle that is used after that connects anew.

        Raises:
            PenstockError: some calls were not queued within ``close_timeout_s``. They are not given up: they are queued
                later if the process lives on, and lost if it does not.
        """
        self._close()

    def _close(self) -> None:
        try:
            wait_until_queued(self.redis_url, self.instance, self._close_timeout_s)
        finally:
            background_loop.run(self._leave())

    async def _leave(self) -> None:
        held, self._caller = self._caller, None
        if held is not None:
            held.remove_user()
        caller = SharedClient.find(self.redis_url, self.instance)
        if caller is not None:
            await caller.leave()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()  # a `Client` closes more
        except PenstockError as e:
            if error is None:
                raise
            log.warning("%s", e)  # what ended the block matters more


def wait_until_queued(url: str, instance: str, timeout_s: float) -> None:
    """Wait until all calls of this process's sync handles are durably queued or refused.

    Raises:
        PenstockError: some were neither within ``timeout_s``.
    """
    if late := background_loop.run(_calls_not_queued(url, instance, timeout_s)):
        raise PenstockError(
            f"{late} calls to {shown_url(url)} were not queued within close_timeout_s={timeout_s:g}, and are lost if "
            "this process ends now: wait for their futures, or give a longer close_timeout_s"
        )


async def _calls_not_queued(url: str, instance: str, timeout_s: float) -> int:
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout_s
    late = 0
    if tasks := starting_tasks(url, instance):
        _, waiting = await asyncio.wait(tasks, timeout=timeout_s)
        late = len(waiting)
    caller = SharedClient.find(url, instance)
    if caller is not None:
        late += await caller.wait_until_queued(max(0.0, ends - loop.time()))
    return late
