"""Batch producers: any number of items through an endpoint.

They publish to the batch stream, so that interactive requests go first, and hold in memory what is in flight and no
more.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
)
from dataclasses import replace
from itertools import islice
from typing import Any, cast

from ...broker.defaults import default_instance
from ...broker.wire.keys import check_name
from .. import background_loop
from ..calls.request_client import RequestClient
from ..errors import ConfigError
from ..files.rows import Rows
from ..options import CallOptions
from .items import BatchResult
from .pipeline import BatchPipeline, JobSource

_PULL_S = 0.005
"""Items are sent that are there, rather than waited for in company."""
JOB_TTL_S = 24 * 3600.0


class BatchProducer:
    """Sends batches to one endpoint. It needs a Redis URL and no Ray; ``client.batch(endpoint)`` makes it too.

    ::

        producer = handles.connect("redis://broker:6379").batch("score")
        for result in producer.as_completed(rows):      # or `async for`
            print(result.index, result.value if result.error is None else result.error)

    With a ``job``, results lie in a stream of their own until they expire. A producer that was killed and is started
    again with the same items, in the same order, under the same name sends only what was not accepted, and gives the
    results of all, each once. The name belongs to that input: other items, fewer or more, or another method are refused
    with a ``ConfigError``.
    """

    def __init__(
        self,
        redis_url: str,
        endpoint: str,
        *,
        instance: str | None = None,
        window: int | None = None,
        timeout_s: float | None = None,
        method_name: str = "__call__",
        shard_key: str | None = None,
        job: str | None = None,
        job_ttl_s: float = JOB_TTL_S,
        restart_job: bool = False,
        retry_errors: bool = False,
    ) -> None:
        """Say where, and how; nothing is sent yet.

        Args:
            redis_url: ``redis://``, ``rediss://`` or ``unix://``.
            endpoint: its name.
            instance: as given to ``serve.start``; see `handles.connect` for the default.
            window: how many items may be in flight at a time. By default four times as many as the replicas can hold,
                at least 1000, and at most half of ``max_queued_requests``.
            timeout_s: seconds until an item expires, counted from when it is first sent; None is never.
            method_name: the method of the backend's class.
            shard_key: items with the same key go to the same backend.
            job: a name, for a job that outlives this producer.
            job_ttl_s: how long the results of a job lie there once its producer is gone. Those over 256 KiB lie there
                for two minutes, and are computed anew after that.
            restart_job: forget what a former producer of the job has done, and begin anew.
            retry_errors: run again the items whose result was an error when the job ran before.

        An item can have options of its own: see `BatchItem`.

        Raises:
            TypeError: an argument is of the wrong type.
            ConfigError: a value cannot be.
        """
        self._url, self._instance = (
            redis_url,
            check_name("an instance", default_instance() if instance is None else instance),
        )
        self._endpoint = check_name("an endpoint", endpoint)
        self._options = CallOptions(method_name=method_name, shard_key=shard_key, timeout_s=timeout_s)
        self._window = None if window is None else _count("window", window)
        self._job = None if job is None else check_name("a job", job)
        if isinstance(job_ttl_s, bool) or not isinstance(job_ttl_s, int | float):
            raise TypeError(f"job_ttl_s must be a number of seconds, not {type(job_ttl_s).__name__}")
        if not 1 <= job_ttl_s <= 1e9:
            raise ConfigError(f"job_ttl_s must be 1 to 1e9 seconds, not {job_ttl_s}")
        self._job_ttl_s = float(job_ttl_s)
        for name, value in (("restart_job", restart_job), ("retry_errors", retry_errors)):
            if type(value) is not bool:
                raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
            if value and job is None:
                raise ConfigError(f"{name} is for a job: give its name")
        self._source = JobSource(restart_job=restart_job, retry_errors=retry_errors)

    def describe_source(
        self, name: str, names: list[str] | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        """Say which file or directory the items come from, so that the job is refused with another one.

        Args:
            name: of the file or directory.
            names: of the files that are the items. When the batch begins, they are put, in place, into the order that
                they had when the job ran before, new ones behind them: iterate over the list itself.
            on_restart: called before a job that is begun anew is forgotten, to delete what is stored of it.
        """
        self._source = replace(self._source, name=name, names=names, on_restart=on_restart)

    def __repr__(self) -> str:
        job = "" if self._job is None else f", job={self._job!r}"
        return f"BatchProducer({self._endpoint!r}, instance={self._instance!r}{job})"

    def as_completed(self, items: Iterable[Any] | AsyncIterable[Any], *, skip: Container[int] = ()) -> Batch:
        """Return the results of ``items`` as they come, to iterate over once: with ``for`` or with ``async for``.

        Args:
            items: values as handles send them, or `BatchItem`. They are taken one by one as there is room: with
                ``for`` in the thread that iterates, with ``async for`` in the loop, which they must not block. An
                exception among them is not sent: it is its own result's ``error``.
            skip: indices of items that are not to be sent, nor their results given: what was done before.
        """
        return Batch(self, items, skip, in_order=False)

    def map(self, items: Iterable[Any] | AsyncIterable[Any], *, skip: Container[int] = ()) -> Batch:
        """Return the results of ``items`` in their order; see `as_completed`."""
        return Batch(self, items, skip, in_order=True)

    async def produce(self, batch: Batch, **callbacks: Any) -> BatchPipeline:
        """Open what carries ``batch`` out, in the running loop."""
        if self._job is None:
            caller = await RequestClient.get(self._url, self._instance)
        else:
            caller = RequestClient(self._url, self._instance, job=self._job, job_ttl_s=self._job_ttl_s)
        production = BatchPipeline(
            caller,
            self._endpoint,
            self._options,
            self._window,
            skip=batch.skip,
            in_order=batch.in_order,
            source=batch.described(self._source),
            **callbacks,
        )
        if self._job is not None:
            await caller.open()
        return production


class Batch:
    """The results of one batch. Leaving the iteration early gives up what is in flight, unless it is a job's.

    Iterating raises:

    - EndpointNotFound: there is no such endpoint; nothing was sent.
    - ConfigError: another producer works on the job, or the job is another endpoint's; nothing was sent.
    - BrokerUnavailable: Redis cannot be reached, or was away for more than a minute.
    - NotPermitted: its rules do not let the Redis user of the URL do what that takes.
    - whatever iterating over the items raises.

    What goes wrong with one item is its result's ``error``. Refusals (`Overloaded`) are none: the item is sent again.
    """

    def __init__(
        self,
        producer: BatchProducer,
        items: Iterable[Any] | AsyncIterable[Any],
        skip: Container[int],
        *,
        in_order: bool,
    ) -> None:
        if not isinstance(items, Iterable | AsyncIterable):
            raise TypeError(f"a batch is an iterable or an async iterable of items, not a {type(items).__name__}")
        if not isinstance(cast(object, skip), Container):
            raise TypeError(f"skip must hold indices, such as a set does, not be a {type(skip).__name__}")
        self.skip, self.in_order = skip, in_order
        self._producer, self._items = producer, items
        self._begun = False
        self._forget: Any = None

    def checkpoint(self) -> None:
        """Say that all results up to now are stored where they are safe, so that the job need keep them no longer.

        The producer that continues the job must be told to ``skip`` them. Without a job this does nothing.
        """
        if self._forget is not None:
            self._forget()

    def described(self, source: JobSource) -> JobSource:
        """Return ``source`` with what the items know of where they come from."""
        if isinstance(self._items, Rows) and not source.name:
            return replace(source, name=self._items.source, names=self._items.names)
        return source

    def _close_items(self) -> None:
        if isinstance(self._items, Rows):
            self._items.close()

    def _begin(self) -> None:
        if self._begun:
            raise RuntimeError("a batch can be iterated over once")
        self._begun = True

    # -- from asyncio code

    def __aiter__(self) -> AsyncIterator[BatchResult]:
        self._begin()
        return self._in_loop()

    async def _in_loop(self) -> AsyncGenerator[BatchResult]:
        some, wanted = asyncio.Event(), deque[int]()
        want = asyncio.Event()

        def on_want(count: int) -> None:
            wanted.append(count)
            want.set()

        production = await self._producer.produce(self, on_results=some.set, on_want=on_want)
        self._forget = production.forget_results
        order = _Order(self.skip) if self.in_order else None
        tasks = [
            asyncio.ensure_future(_told(production, production.open())),
            asyncio.ensure_future(_told(production, self._feed(production, want, wanted))),
        ]
        try:
            while True:
                while production.results:
                    results = list(production.results)
                    production.results.clear()
                    if order is not None:
                        results = order.sorted(results)
                    for result in results:
                        yield result
                    production.took(results)
                if production.failure is not None:
                    raise production.failure
                if production.over:
                    return
                some.clear()
                await some.wait()
        finally:
            self._forget = None
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._close_items()
            await production.close()

    async def _feed(self, production: BatchPipeline, want: asyncio.Event, wanted: deque[int]) -> None:
        items = self._items
        if isinstance(items, AsyncIterable):
            iterator = aiter(items)
            while True:
                await _until(want, wanted)
                for _ in range(wanted.popleft()):
                    try:
                        item = await anext(iterator)
                    except StopAsyncIteration:
                        production.feed((), last=True)
                        return
                    production.feed((item,))
        else:
            plain = iter(items)
            while True:
                await _until(want, wanted)
                count = wanted.popleft()
                chunk = list(islice(plain, count))
                production.feed(chunk, last=len(chunk) < count)
                if len(chunk) < count:
                    return
                await asyncio.sleep(0)  # whoever has many items must not keep the loop from everything else

    # -- from sync code

    def __iter__(self) -> Iterator[BatchResult]:
        if not isinstance(self._items, Iterable):
            raise TypeError(f"the items are a {type(self._items).__name__}, which only `async for` can iterate over")
        self._begin()
        return self._in_thread(iter(self._items))

    def _in_thread(self, items: Iterator[Any]) -> Generator[BatchResult]:
        loop = background_loop.loop()
        # What the loop says: how many items it wants, or None if there are results, or it is over.
        words: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        async def begin() -> tuple[BatchPipeline, asyncio.Task[None]]:
            production = await self._producer.produce(self, on_results=lambda: words.put(None), on_want=words.put)
            return production, loop.create_task(_told(production, production.open()))

        async def end() -> None:
            opening.cancel()
            await asyncio.wait([opening])
            await production.close()

        production, opening = background_loop.run(begin())
        self._forget = lambda: loop.call_soon_threadsafe(production.forget_results)
        order = _Order(self.skip) if self.in_order else None
        try:
            while True:
                word = words.get()
                if word is not None:
                    chunk, last = _pull(items, word)
                    loop.call_soon_threadsafe(_fed, production, chunk, last)
                while production.results:
                    results = _drain(production.results)
                    if order is not None:
                        results = order.sorted(results)
                    yield from results
                    loop.call_soon_threadsafe(production.took, results)
                if production.failure is not None:
                    raise production.failure
                if production.over and not production.results:
                    return
        finally:
            self._forget = None
            self._close_items()
            if not sys.is_finalizing():  # else the loop's thread is gone already
                background_loop.run(end())


class _Order:
    """Puts results into the order of their items."""

    def __init__(self, skip: Container[int]) -> None:
        self._skip = skip
        self._next = 0
        self._early: dict[int, BatchResult] = {}

    def sorted(self, results: Iterable[BatchResult]) -> list[BatchResult]:
        """Return what is next, now that there are ``results``."""
        for result in results:
            self._early[result.index] = result
        ready: list[BatchResult] = []
        while self._early:
            if self._next in self._early:
                ready.append(self._early.pop(self._next))
            elif self._next not in self._skip:
                break
            self._next += 1
        return ready


async def _told(production: BatchPipeline, work: Any) -> None:
    """Do ``work``, whose failure is that of the batch."""
    try:
        await work
    except Exception as e:
        production.fail(e)


async def _until(event: asyncio.Event, something: deque[int]) -> None:
    while not something:
        event.clear()
        await event.wait()


def _fed(production: BatchPipeline, chunk: list[Any], last: bool) -> None:
    try:
        production.feed(chunk, last=last)
    except Exception as e:
        production.fail(e)


def _pull(items: Iterator[Any], count: int) -> tuple[list[Any], bool]:
    """Return up to ``count`` items, at least one, and whether they are the last: as many as come soon."""
    chunk: list[Any] = []
    ends = None
    for item in items:
        chunk.append(item)
        if len(chunk) == count:
            return chunk, False
        now = time.monotonic()
        if ends is None:
            ends = now + _PULL_S
        elif now > ends:
            return chunk, False
    return chunk, True


def _drain(results: deque[BatchResult]) -> list[BatchResult]:
    drained: list[BatchResult] = []
    while results:
        drained.append(results.popleft())
    return drained


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
    return value
