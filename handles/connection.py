"""The thin door: an instance by its Redis URL, with redis and orjson alone."""

from __future__ import annotations

from typing import Any, Literal, overload

from ..broker.keys import check_name
from . import background
from .batch import JOB_TTL_S, BatchProducer
from .caller import Caller
from .dead_letters import DeadLetters
from .errors import EndpointNotFound
from .handle import AsyncServeHandle, ServeHandle, warn_of_the_other_face


def connect(redis_url: str, instance: str = "default") -> Connected:
    """Return the instance of that name on that Redis. Needs no Ray, and runs nothing of it.

    Args:
        redis_url: ``redis://``, ``rediss://`` or ``unix://``.
        instance: as given to ``serve.start``.

    Raises:
        ConfigError: that is no Redis URL, or no name of an instance.
        BrokerUnavailable: Redis cannot be reached, or does not let us in.
        NotPermitted: its rules do not let the user of the URL do what callers do.
    """
    connected = Connected(redis_url, instance)
    connected.list_endpoints()
    return connected


class Connected:
    """An instance, as its callers see it."""

    def __init__(self, redis_url: str, instance: str) -> None:
        self.redis_url, self.instance = redis_url, instance

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
        """Return ``{name: {"route", "methods", "traffic", "shadows"}}``. Raises `BrokerUnavailable`."""
        return background.run(self._list_endpoints())

    async def _list_endpoints(self) -> dict[str, dict[str, Any]]:
        caller = await Caller.get(self.redis_url, self.instance)
        # Asked of Redis, not of the watcher, which may be a moment behind.
        endpoints = (await caller.registry.snapshot()).endpoints
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(endpoint.traffic),
                "shadows": dict(endpoint.shadows),
            }
            for name, endpoint in endpoints.items()
        }

    def close(self) -> None:
        """Close what the sync handles of this process share: calls in flight fail with `RequestCancelled`.

        A handle that is used after that connects anew.
        """
        background.run(self._close())

    async def _close(self) -> None:
        caller = Caller.shared(self.redis_url, self.instance)
        if caller is not None:
            await caller.close()

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
