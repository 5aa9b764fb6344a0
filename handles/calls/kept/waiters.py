"""Waits of one caller for the results of kept requests.

The record of a kept request names the callers that wait for it, and the replica sends the result to the reply stream of
each: a wait needs no command but the first. One command for each backend every few seconds finds the results whose
replica died between storing and sending them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Union

from ....broker.queue.queued_bytes import NO_LIMIT
from ....broker.results.accepting import KeptAdmission, KeptEntry
from ....broker.results.reading import KeptReader
from ....broker.transport.connection import RedisConnection
from ....broker.wire.call_ids import shown_id
from ....broker.wire.kept import CANCELLED, FAILED, FINAL, IN_REDIS, Result
from ....broker.wire.replies import Reply
from ...errors import BrokerRefused, BrokerUnavailable, RequestCancelled, RequestNotFound, RequestTimeout, ResultExpired

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 2.0
"""How often to look for results that were stored and never sent."""

Outcome = Union[Result, BaseException, None]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""A result, an error, or None: the result lies in Redis."""


class Waiter:
    """One wait for the result of a kept request."""

    __slots__ = ("_future", "again", "backend", "call", "id", "is_done", "outcome", "raw", "since_s", "task", "then")

    def __init__(self, caller: bytes, call: str, backend: str, id_: str) -> None:
        self.call, self.backend, self.id = call, backend, id_
        self.raw = caller + b" " + call.encode()
        """As the record of the request names it."""
        self.is_done = False
        """Whether there is an outcome."""
        self.outcome: Outcome = None
        self.then: Callable[[Outcome], None] | None = None
        """Called with the outcome."""
        self.task: asyncio.Task[Result] | None = None
        """The task that waits instead of ``then``."""
        self._future: asyncio.Future[None] | None = None
        self.since_s = math.inf
        """Since when the record of the request names it, by the loop's clock; before, there may be no record."""
        self.again: KeptEntry | None = None
        """The request, if this caller submitted it: Redis may have lost it."""

    def resolve(self, reply: Reply | BaseException) -> None:
        """End the wait with the reply that the replica sent, or with an error."""
        if isinstance(reply, Reply):
            self._end(None if reply.codec == IN_REDIS else Result(reply))
        else:
            self._end(reply)

    def time_out(self, timeout_s: float | None) -> None:
        """End the wait after ``timeout_s`` seconds."""
        self._end(RequestTimeout(f"backend {self.backend!r}", timeout_s or 0.0))

    def fetch(self) -> None:
        """End the wait: the result lies in Redis."""
        self._end(None)

    def begin(self) -> None:
        """Note that the record of the request names the waiter."""
        self.since_s = asyncio.get_running_loop().time()

    def begin_again(self) -> None:
        """Wait once more: the outcome came before there was a result."""
        self.is_done, self.outcome = False, None
        self.begin()

    async def wait(self) -> Outcome:
        """Return the outcome as soon as there is one."""
        if not self.is_done:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        return self.outcome

    def _end(self, outcome: Outcome) -> None:
        if self.is_done:
            return
        self.is_done, self.outcome = True, outcome
        if self.then is not None:
            self.then(outcome)
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)


class Waiters:
    """The waits in progress. Only for the loop of the caller.

    Args:
        connection: of the caller.
        caller: its id, as entries have it.
        admission: accepts a request again that Redis has lost.
        reader: of kept requests.
        new_call: returns the id of another call, which is its secret.
        check_backend: raises `BackendNotFound` for a backend that does not exist.
        on_none: called when no wait is in progress any more.
    """

    def __init__(
        self,
        connection: RedisConnection,
        caller: bytes,
        admission: KeptAdmission,
        reader: KeptReader,
        new_call: Callable[[], str],
        check_backend: Callable[[str], object],
        on_none: Callable[[], None],
    ) -> None:
        self._connection, self._caller = connection, caller
        self._admission, self._reader = admission, reader
        self._new_call, self._check_backend, self._on_none = new_call, check_backend, on_none
        self._waiters: dict[str, Waiter] = {}
        """By the ids of their calls."""
        self._checker: asyncio.TimerHandle | None = None
        self._check: asyncio.Task[None] | None = None

    @property
    def any(self) -> bool:
        """Whether any wait is in progress."""
        return bool(self._waiters)

    def receiver_of(self, call: str) -> Callable[[Reply | BaseException], None] | None:
        """Return the function that receives the reply to a call; None if no waiter has that id."""
        waiter = self._waiters.get(call)
        return None if waiter is None else waiter.resolve

    def close(self) -> None:
        """End all waits with `RequestCancelled`. The requests go on."""
        if self._checker is not None:
            self._checker.cancel()
        if self._check is not None:
            self._check.cancel()
        for waiter in list(self._waiters.values()):
            waiter.resolve(RequestCancelled(shown_id("", waiter.id)))

    def new(self, backend: str, id_: str) -> Waiter:
        """Return a new wait for the result of a request. `forget` ends it."""
        waiter = Waiter(self._caller, self._new_call(), backend, id_)
        self._waiters[waiter.call] = waiter
        if self._checker is None:
            self._checker = asyncio.get_running_loop().call_later(_CHECK_EVERY_S, self._begin_check)
        return waiter

    def forget(self, waiter: Waiter, *, unwatch: bool) -> None:
        """Stop a wait; with ``unwatch``, take it from the record of the request too."""
        if self._waiters.pop(waiter.call, None) is None:
            return
        if unwatch and self._connection.connected:
            self._reader.unwatch(waiter.backend, waiter.id, waiter.raw)
        if not self._waiters:
            self._on_none()

    def abandon(self, waiter: Waiter) -> None:
        """Stop a wait whose result nothing takes any more."""
        waiter.then = None
        if waiter.task is not None:
            waiter.task.cancel()
        self.forget(waiter, unwatch=True)

    async def watch(self, waiter: Waiter) -> str:
        """Let the record of the request name a waiter, and return the state of the request.

        Raises:
            RequestNotFound: there is no such request.
        """
        if (state := await self._reader.watch(waiter.backend, waiter.id, waiter.raw)) is None:
            raise RequestNotFound
        waiter.begin()
        return state

    async def result(self, waiter: Waiter, state: str, timeout_s: float | None) -> Result:
        """Wait until the request has a result, return it, and forget the waiter.

        Args:
            waiter: one that the record of the request names.
            state: the state of the request then.
            timeout_s: seconds to wait; None for no limit.

        Raises:
            RequestTimeout: there was no result in time.
            RequestCancelled: the request was cancelled.
            ResultExpired, RequestNotFound, BackendNotFound: its result is gone.
        """
        loop = asyncio.get_running_loop()
        ends_s = math.inf if timeout_s is None else loop.time() + timeout_s
        result: Result | None = None
        try:
            while result is None:
                if state not in FINAL:
                    timer = None if ends_s == math.inf else loop.call_at(ends_s, waiter.time_out, timeout_s)
                    try:
                        outcome = await waiter.wait()
                    finally:
                        if timer is not None:
                            timer.cancel()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    result = outcome
                if result is None and (result := await self.fetch(waiter.backend, waiter.id)) is None:
                    waiter.begin_again()
                    state = await self._reader.watch(waiter.backend, waiter.id, waiter.raw) or FAILED
            return result
        finally:
            self.forget(waiter, unwatch=result is None)

    def on_result(
        self, waiter: Waiter, state: str, timeout_s: float | None, then: Callable[[Result | BaseException], None]
    ) -> None:
        """Call ``then`` with what `result` returns or raises, unless `abandon` ends the wait before.

        A result that the replica sends needs no task.
        """

        def on_outcome(outcome: Outcome) -> None:
            waiter.then = None
            if outcome is None:
                in_task()
            else:
                self.forget(waiter, unwatch=not isinstance(outcome, Result))
                then(outcome)

        def in_task() -> None:
            waiter.task = task = asyncio.get_running_loop().create_task(self.result(waiter, state, timeout_s))
            task.add_done_callback(on_end)

        def on_end(task: asyncio.Task[Result]) -> None:
            waiter.task = None
            if not task.cancelled():
                then(task.exception() or task.result())

        if timeout_s is None and state not in FINAL and not waiter.is_done:
            waiter.then = on_outcome
        else:
            in_task()

    async def fetch(self, backend: str, id_: str) -> Result | None:
        """Return the result of a request; None if it is not final yet.

        Raises:
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound, BackendNotFound: its result is gone.
        """
        if (result := await self._reader.result(backend, id_)) is not None:
            return result
        status, _ = await self._reader.status(backend, id_)
        if status is None:
            self._check_backend(backend)
            raise RequestNotFound
        if not status.is_final:
            return None
        if status.status == CANCELLED:
            raise RequestCancelled(status.request_id)
        # It may have ended between the two.
        if (result := await self._reader.result(backend, id_)) is None:
            raise ResultExpired(status.request_id)
        return result

    def _begin_check(self) -> None:
        self._checker = None
        if not self._waiters:
            return
        loop = asyncio.get_running_loop()
        self._checker = loop.call_later(_CHECK_EVERY_S, self._begin_check)
        if self._connection.connected and (self._check is None or self._check.done()):
            self._check = loop.create_task(self._fetch_unsent(loop.time() - _CHECK_EVERY_S))

    async def _fetch_unsent(self, since_s: float) -> None:
        by_backend: defaultdict[str, dict[str, list[Waiter]]] = defaultdict(lambda: defaultdict(list))
        for waiter in self._waiters.values():
            if waiter.since_s <= since_s:
                by_backend[waiter.backend][waiter.id].append(waiter)
        try:
            for backend, waiters in by_backend.items():
                for id_ in await self._reader.finished(backend, list(waiters)):
                    for waiter in waiters[id_]:
                        waiter.fetch()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot look for results that were not sent: %s", e)

    async def watch_again(self) -> None:
        """Name all waiters again after the reply stream or the connection was lost, and accept lost requests again.

        Raises:
            BrokerUnavailable, BrokerRefused: it is to be called again.
        """
        begun = [waiter for waiter in self._waiters.values() if waiter.since_s < math.inf]
        for waiter in begun:
            state = await self._reader.watch(waiter.backend, waiter.id, waiter.raw)
            if state is None and waiter.again is not None:
                # It was accepted, and the broker has lost it: nothing may refuse it now.
                await self._admission.accept(waiter.backend, waiter.again, waiter.raw, NO_LIMIT, NO_LIMIT, NO_LIMIT)
            elif state is None or state in FINAL:
                waiter.fetch()
