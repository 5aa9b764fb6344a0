"""Batch: the results of one batch of items, to iterate over from sync or asyncio code."""

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
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice
from typing import Any, Protocol, cast

from ...runtime.notebooks import NotebookTable
from .. import background_loop
from ..files.rows import Rows
from .items import BatchResult
from .pipeline import BatchPipeline
from .progress import BatchProgress

_MAX_PULL_S = 0.005
"""Seconds after which the items that a slow input has given are sent, instead of waiting for a full chunk."""


class OpenPipeline(Protocol):
    """Opens the pipeline that carries out a batch, for the length of a block; see `BatchPipeline`."""

    def __call__(
        self,
        *,
        skip: Container[int],
        in_order: bool,
        on_results: Callable[[], None],
        on_want: Callable[[int], None],
    ) -> AbstractAsyncContextManager[BatchPipeline]: ...


class Batch(NotebookTable):
    """The results of one batch, to iterate over once, with ``for`` or ``async for``.

    Made by `BatchProducer.map` and `BatchProducer.as_completed`. Nothing is sent before the iteration begins. Leaving
    it early cancels the items in flight, unless they belong to a job. A failed item does not end the iteration: its
    error is the ``error`` of its result. A refused item (`Overloaded`) is sent again.

    Iterating raises:

    - EndpointNotFound: there is no such endpoint; nothing was sent.
    - ConfigError: another producer works on the job, or the job belongs to another endpoint; nothing was sent.
    - BrokerUnavailable: Redis cannot be reached, or was away for more than a minute.
    - NotPermitted: the Redis user of the URL lacks a permission.
    - RuntimeError: the batch has been iterated over before.
    - whatever iterating over the items raises.
    """

    def __init__(
        self,
        endpoint: str,
        items: Iterable[Any] | AsyncIterable[Any],
        open_pipeline: OpenPipeline,
        *,
        skip: Container[int],
        in_order: bool,
    ) -> None:
        if not isinstance(items, Iterable | AsyncIterable):
            raise TypeError(f"a batch is an iterable or an async iterable of items, not a {type(items).__name__}")
        if not isinstance(cast(object, skip), Container):
            raise TypeError(f"skip must hold indices, such as a set does, not be a {type(skip).__name__}")
        self.skip, self.in_order = skip, in_order
        self._endpoint, self._items, self._open_pipeline = endpoint, items, open_pipeline
        self._has_begun = False
        self._checkpoint: Callable[[], object] | None = None
        """Deletes the job's results that have been taken; None outside the iteration."""
        self._pipeline: BatchPipeline | None = None
        """While ``for`` iterates."""

    def __repr__(self) -> str:
        return f"Batch({self._endpoint!r}, in_order={self.in_order}{', iterated' if self._has_begun else ''})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"endpoint": self._endpoint, "in_order": self.in_order, "iterated": self._has_begun}

    def checkpoint(self) -> None:
        """Declare that all results so far are stored safely, so that the job can delete its copies.

        A producer that continues the job must ``skip`` them. Without a job this does nothing.
        """
        if self._checkpoint is not None:
            self._checkpoint()

    def progress(self) -> BatchProgress | None:
        """Return how the batch is doing, from any thread, while one iterates over it with ``for``; else None."""
        pipeline = self._pipeline
        return None if pipeline is None else background_loop.run(pipeline.progress())

    def _close_items(self) -> None:
        """Close the files that an iteration which was left early has open."""
        if isinstance(self._items, Rows):
            self._items.close()

    @asynccontextmanager
    async def _closing_items(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            self._close_items()

    def _begin(self) -> None:
        if self._has_begun:
            raise RuntimeError("a batch can be iterated over once")
        self._has_begun = True

    # -- from asyncio code

    def __aiter__(self) -> AsyncIterator[BatchResult]:
        self._begin()
        return self._iterate_in_loop()

    async def _iterate_in_loop(self) -> AsyncGenerator[BatchResult]:
        has_results, wanted = asyncio.Event(), asyncio.Queue[int]()
        order = _Order(self.skip) if self.in_order else None
        opened = self._open_pipeline(
            skip=self.skip, in_order=self.in_order, on_results=has_results.set, on_want=wanted.put_nowait
        )
        async with self._closing_items(), opened as pipeline:
            self._checkpoint = pipeline.checkpoint
            tasks = [
                asyncio.ensure_future(_fail_pipeline_with(pipeline, pipeline.start())),
                asyncio.ensure_future(_fail_pipeline_with(pipeline, self._feed(pipeline, wanted))),
            ]
            try:
                while True:
                    while pipeline.results:
                        results = list(pipeline.results)
                        pipeline.results.clear()
                        if order is not None:
                            results = order.sort(results)
                        for result in results:
                            yield result
                        pipeline.on_taken(results)
                    if pipeline.failure is not None:
                        raise pipeline.failure
                    if pipeline.is_over:
                        return
                    has_results.clear()
                    await has_results.wait()
            finally:
                self._checkpoint = None
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    async def _feed(self, pipeline: BatchPipeline, wanted: asyncio.Queue[int]) -> None:
        """Feed the pipeline with the number of items that it wants, until the input ends."""
        if isinstance(self._items, AsyncIterable):
            iterator = aiter(self._items)
            while True:
                for _ in range(await wanted.get()):
                    try:
                        item = await anext(iterator)
                    except StopAsyncIteration:
                        pipeline.feed((), is_last=True)
                        return
                    pipeline.feed((item,))
        else:
            plain = iter(self._items)
            while True:
                count = await wanted.get()
                chunk = list(islice(plain, count))
                pipeline.feed(chunk, is_last=len(chunk) < count)
                if len(chunk) < count:
                    return
                await asyncio.sleep(0)  # a long input must not starve the other tasks of the loop

    # -- from sync code

    def __iter__(self) -> Iterator[BatchResult]:
        if not isinstance(self._items, Iterable):
            raise TypeError(f"the items are a {type(self._items).__name__}, which only `async for` can iterate over")
        self._begin()
        return self._iterate_in_thread(iter(self._items))

    def _iterate_in_thread(self, items: Iterator[Any]) -> Generator[BatchResult]:
        loop = background_loop.loop()
        # From the loop to this thread: a number of items that are wanted, or None if there are results or it is over.
        events: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        opened = self._open_pipeline(
            skip=self.skip, in_order=self.in_order, on_results=lambda: events.put(None), on_want=events.put
        )

        async def start() -> tuple[BatchPipeline, asyncio.Task[None]]:
            pipeline = await opened.__aenter__()
            return pipeline, loop.create_task(_fail_pipeline_with(pipeline, pipeline.start()))

        async def stop() -> None:
            starting.cancel()
            await asyncio.wait([starting])
            await opened.__aexit__(None, None, None)

        try:
            pipeline, starting = background_loop.run(start())
        except BaseException:
            self._close_items()
            raise
        self._pipeline = pipeline
        self._checkpoint = lambda: loop.call_soon_threadsafe(pipeline.checkpoint)
        order = _Order(self.skip) if self.in_order else None
        try:
            while True:
                wanted = events.get()
                if wanted is not None:
                    chunk, is_last = _pull(items, wanted)
                    loop.call_soon_threadsafe(_feed_pipeline, pipeline, chunk, is_last)
                while pipeline.results:
                    results = _take_all(pipeline.results)
                    if order is not None:
                        results = order.sort(results)
                    yield from results
                    loop.call_soon_threadsafe(pipeline.on_taken, results)
                if pipeline.failure is not None:
                    raise pipeline.failure
                if pipeline.is_over and not pipeline.results:
                    return
        finally:
            self._checkpoint = self._pipeline = None
            self._close_items()
            if not sys.is_finalizing():  # the interpreter has ended the loop's thread
                background_loop.run(stop())


class _Order:
    """Sorts results into the order of their items."""

    def __init__(self, skip: Container[int]) -> None:
        self._skip = skip
        self._next_index = 0
        self._early: dict[int, BatchResult] = {}
        """Results of items behind the next one."""

    def sort(self, results: Iterable[BatchResult]) -> list[BatchResult]:
        """Add ``results``, and return those that are next in order."""
        for result in results:
            self._early[result.index] = result
        ready: list[BatchResult] = []
        while self._early:
            if self._next_index in self._early:
                ready.append(self._early.pop(self._next_index))
            elif self._next_index not in self._skip:
                break
            self._next_index += 1
        return ready


async def _fail_pipeline_with(pipeline: BatchPipeline, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``, and make its exception that of the batch."""
    try:
        await work
    except Exception as e:
        pipeline.fail(e)


def _feed_pipeline(pipeline: BatchPipeline, chunk: list[Any], is_last: bool) -> None:
    try:
        pipeline.feed(chunk, is_last=is_last)
    except Exception as e:
        pipeline.fail(e)


def _pull(items: Iterator[Any], count: int) -> tuple[list[Any], bool]:
    """Return one to ``count`` items, fewer if the input is slow, and whether the input has ended behind them."""
    chunk: list[Any] = []
    ends_s = None
    for item in items:
        chunk.append(item)
        if len(chunk) == count:
            return chunk, False
        now_s = time.monotonic()
        if ends_s is None:
            ends_s = now_s + _MAX_PULL_S
        elif now_s > ends_s:
            return chunk, False
    return chunk, True


def _take_all(results: deque[BatchResult]) -> list[BatchResult]:
    """Remove and return all results. Another thread may append meanwhile."""
    taken: list[BatchResult] = []
    while results:
        taken.append(results.popleft())
    return taken
