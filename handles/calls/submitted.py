"""Submitted requests: durable calls whose results stay in Redis, for any holder of their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...broker.wire.kept import FINAL, RequestStatus
from ...runtime.notebooks import NotebookTable
from .. import background_loop
from ..replies.response import value_of_result
from .shared_client import SharedClient


class AsyncSubmitted(NotebookTable):
    """A submitted request, for asyncio code."""

    def __init__(self, redis_url: str, instance: str, id_: str) -> None:
        self._url, self._instance, self._id = redis_url, instance, id_

    @property
    def id(self) -> str:
        """The secret by which any process finds the request: `Connection.submitted`, or ``/-/requests/<id>``."""
        return self._id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._id[:6]}…, instance={self._instance!r})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"id": f"{self._id[:6]}…", "instance": self._instance}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._instance, self._id)

    async def status(self) -> RequestStatus:
        """Return the status.

        Raises:
            RequestNotFound: there is no such request.
            ResultExpired: it ended more than ``result_ttl_s`` seconds ago.
            BrokerUnavailable: Redis cannot be reached.
        """
        async with SharedClient.using(self._url, self._instance) as client:
            return await client.kept.status(await client.kept.find_backend(self._id), self._id)

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it: the value that the code returned, or a list of those that it yielded.

        Args:
            timeout: seconds to wait at most; None waits until there is one.

        Raises:
            BackendError: the code raised.
            RequestTimeout: there was no result in time, or the request's own deadline passed in the queue.
            RequestCancelled: it was cancelled.
            ResultExpired: its result was kept for ``result_ttl_s`` seconds.
            RequestNotFound: there is no such request.
            BrokerUnavailable: Redis cannot be reached.
        """
        async with SharedClient.using(self._url, self._instance) as client:
            backend = await client.kept.find_backend(self._id)
            return value_of_result(await client.kept.wait(backend, self._id, timeout))

    async def cancel(self) -> bool:
        """Cancel the request; return False if it had ended. A queued one never starts.

        Running ``async def`` code is cancelled. Other code runs to its end, and its result is dropped.

        Raises:
            RequestNotFound: there is no such request.
            BrokerUnavailable: Redis cannot be reached.
        """
        async with SharedClient.using(self._url, self._instance) as client:
            return await client.kept.cancel(await client.kept.find_backend(self._id), self._id) not in FINAL


class Submitted(NotebookTable):
    """A submitted request, for sync code. Its methods block; each raises what that of `AsyncSubmitted` does."""

    def __init__(self, redis_url: str, instance: str, id_: str) -> None:
        self._request = AsyncSubmitted(redis_url, instance, id_)

    @property
    def id(self) -> str:
        """The secret by which any process finds the request: `Connection.submitted`, or ``/-/requests/<id>``."""
        return self._request.id

    def __repr__(self) -> str:
        return repr(self._request).replace("AsyncSubmitted", "Submitted", 1)

    def _notebook_fields(self) -> Mapping[str, object]:
        return self._request._notebook_fields()  # pyright: ignore[reportPrivateUsage] - of the object that it wraps

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._request.__reduce__()[1]

    def status(self) -> RequestStatus:
        """Return the status."""
        return background_loop.run(self._request.status())

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result, at most ``timeout`` seconds, and return it."""
        return background_loop.run(self._request.result(timeout))

    def cancel(self) -> bool:
        """Cancel the request; return False if it had ended."""
        return background_loop.run(self._request.cancel())
