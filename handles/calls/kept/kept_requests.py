"""Kept requests of one caller: submit them, wait for their results, read and cancel them by their ids."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from ....broker.queue.publisher import Publisher
from ....broker.registry.records import DEFAULTS, BackendRecord, EndpointRecord
from ....broker.registry.watcher import Watcher
from ....broker.results.accepting import KeptAdmission
from ....broker.results.reading import KeptReader
from ....broker.transport.connection import RedisConnection
from ....broker.wire.kept import RequestStatus, Result, backend_mark, mark_of
from ....broker.wire.keys import Keys
from ....broker.wire.replies import Reply
from ....broker.wire.requests import Header
from ...errors import BackendNotFound, RequestNotFound, ResultExpired, WireError
from ..large_bodies import LargeBodies
from .submission import Submission, Ticket
from .waiters import Waiters


class KeptRequests:
    """The kept requests that one caller submits, and those that it waits for. Only for the loop of the caller.

    Args:
        connection: of the caller.
        keys: of the instance.
        caller: its id, as entries have it.
        watcher: of the registry.
        publisher: of the caller, for reservations.
        bodies: of the caller.
        new_call: returns the id of another call, which is its secret.
        choose: returns the backend for the next request of an endpoint, with a shard key or None.
        shadow: publishes copies of a request to the shadow backends of its endpoint.
        on_idle: called when nothing is in progress any more.
    """

    def __init__(
        self,
        connection: RedisConnection,
        keys: Keys,
        caller: bytes,
        watcher: Watcher,
        publisher: Publisher,
        bodies: LargeBodies,
        new_call: Callable[[], str],
        choose: Callable[[EndpointRecord, str | None], BackendRecord],
        shadow: Callable[[EndpointRecord, Header, bytes], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._watcher, self._on_idle = watcher, on_idle
        admission, self._reader = KeptAdmission(connection, keys), KeptReader(connection, keys)
        self._waiters = Waiters(
            connection, caller, admission, self._reader, new_call, self._check_backend, self._check_idle
        )
        self.submission = Submission(
            connection, admission, self._waiters, watcher, publisher, bodies, choose, shadow, self._progress
        )
        """Submits requests; their tickets are for the methods below."""
        self._in_progress = 0

    @property
    def is_busy(self) -> bool:
        """Whether anything is in progress."""
        return self._in_progress > 0 or self._waiters.any

    def waiter_of(self, call: str) -> Callable[[Reply | BaseException], None] | None:
        """Return the function that receives the reply to a call; None if no waiter has that id."""
        return self._waiters.receiver_of(call)

    def close(self) -> None:
        """End all waits with `RequestCancelled`. The requests go on."""
        self._waiters.close()

    async def result(self, ticket: Ticket, timeout_s: float | None) -> Result:
        """Return the result of a request that was submitted with ``waits``.

        Raises:
            RequestTimeout: there was none after ``timeout_s`` seconds.
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound: its result is gone.
        """
        waiter = ticket.waiter
        assert waiter is not None, "the request was submitted without waits"
        with self._progress():
            return self._checked(waiter.backend, await self._waiters.result(waiter, ticket.state, timeout_s))

    def on_result(
        self, ticket: Ticket, timeout_s: float | None, then: Callable[[Result | BaseException], None]
    ) -> None:
        """Call ``then`` with what `result` returns or raises, unless `forget` is called before."""
        waiter = ticket.waiter
        assert waiter is not None, "the request was submitted without waits"

        def check(outcome: Result | BaseException) -> None:
            if isinstance(outcome, Result):
                try:
                    self._checked(waiter.backend, outcome)
                except WireError as e:
                    outcome = e
            then(outcome)

        self._waiters.on_result(waiter, ticket.state, timeout_s, check)

    async def wait(self, backend: str, id_: str, timeout_s: float | None) -> Result:
        """Return the result of any kept request. Raises what `result` does."""
        with self._progress():
            waiter = self._waiters.new(backend, id_)
            try:
                state = await self._waiters.watch(waiter)
            except BaseException:
                self._waiters.forget(waiter, unwatch=True)
                raise
            return self._checked(backend, await self._waiters.result(waiter, state, timeout_s))

    def forget(self, ticket: Ticket) -> None:
        """Stop waiting for the result of a request."""
        if ticket.waiter is not None:
            self._waiters.abandon(ticket.waiter)

    async def watch_again(self) -> None:
        """Name all waiters again after the reply stream or the connection was lost, and accept lost requests again.

        Raises:
            BrokerUnavailable, BrokerRefused: it is to be called again.
        """
        await self._waiters.watch_again()

    def backend_of(self, id_: str) -> str:
        """Return the backend that has a kept request.

        Raises:
            RequestNotFound: no backend of this instance can have given out that id.
        """
        mark = mark_of(id_)
        for tag in self._watcher.snapshot.backends if mark is not None else ():
            if backend_mark(tag) == mark:
                return tag
        raise RequestNotFound

    async def find_backend(self, id_: str) -> str:
        """Return what `backend_of` does, also for a backend that is newer than the last snapshot of the registry."""
        try:
            return self.backend_of(id_)
        except RequestNotFound:
            if mark_of(id_) is None:
                raise
        await self._watcher.refresh()
        return self.backend_of(id_)

    async def status(self, backend: str, id_: str) -> RequestStatus:
        """Return the status of a kept request. Raises `RequestNotFound`, or `ResultExpired` when its result has."""
        with self._progress():
            status, is_expired = await self._reader.status(backend, id_)
        if status is None:
            raise RequestNotFound
        if is_expired:
            raise ResultExpired(status.request_id)
        return status

    async def find_result(self, backend: str, id_: str) -> Result | None:
        """Return the result of a kept request without waiting; None if there is none yet.

        Raises:
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound: its result is gone.
        """
        with self._progress():
            result = await self._waiters.fetch(backend, id_)
        return None if result is None else self._checked(backend, result)

    async def cancel(self, backend: str, id_: str) -> str:
        """Cancel a kept request and return its state before. One that is final stays as it is.

        Raises:
            RequestNotFound: there is no such request.
        """
        with self._progress():
            record = self._watcher.snapshot.backends.get(backend)
            state = await self._reader.cancel(backend, id_, int(_ttl_s(record) * 1000))
        if state is None:
            raise RequestNotFound
        return state

    async def statuses(self, backend: str) -> list[RequestStatus]:
        """Return the statuses of all kept requests of a backend."""
        with self._progress():
            return [status async for status in self._reader.statuses(backend)]

    def _check_backend(self, backend: str) -> None:
        if backend not in (known := self._watcher.snapshot.backends):
            raise BackendNotFound(backend, known)

    def _checked(self, backend: str, result: Result) -> Result:
        pickled = result.reply.codec == "pickle" or any(codec == "pickle" for codec, _, _ in result.pieces)
        record = self._watcher.snapshot.backends.get(backend)
        if pickled and not (record is not None and record.config.allow_pickle):
            raise WireError(
                f"the result of backend {backend!r} is pickled, and was not read: "
                "the backend was not created with config={'allow_pickle': True}"
            )
        return result

    @contextmanager
    def _progress(self) -> Generator[None]:
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1
            self._check_idle()

    def _check_idle(self) -> None:
        if not self.is_busy:
            self._on_idle()


def _ttl_s(backend: BackendRecord | None) -> float:
    return (DEFAULTS if backend is None else backend.config).result_ttl_s
