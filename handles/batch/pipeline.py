"""Pipeline of a batch: a bounded window of items in flight, with retries of refused ones.

The pipeline runs on the event loop of its client. It requests items when it has room for them, so that memory stays
flat however many there are; `Batch` iterates over the items and the results.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from ...broker.registry.records import EndpointRecord
from ...broker.registry.reports import ReplicaReport
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header, RawEntry
from ..calls.call import Call, queue_limits
from ..calls.large_bodies import LEAST_LARGE, check_size
from ..calls.request_client import RequestClient
from ..errors import BrokerUnavailable, EndpointNotFound, NotPermitted, Overloaded, PenstockError, RequestTimeout
from ..options import CallOptions, check_call_method
from .encoding import EncodedItem, ItemEncoder
from .items import BatchResult, read_result
from .job_progress import JobProgress
from .progress import BatchProgress, WaitsFor

_MIN_WINDOW = 1_000
_MAX_BYTES = 64 * 1024 * 1024
"""The most bytes of bodies in flight: the window is smaller where items are large."""
_CHUNK = 64
"""The most items that are requested at a time. More at a time cost as much for each."""
_MAX_OUTAGE_S = 60.0
"""A batch fails when the broker is away for longer."""
_MAX_RETRY_S = 1.0
"""Seconds after which a refused item is sent again at the latest."""
_SILENCE_S = 1.0
"""A batch that had no result for so long may wait for replicas."""
_SNAPSHOT_TIMEOUT_S = 10.0
_DEFAULT_CONCURRENCY = 16
"""Assumed number of concurrent calls of a replica without a configured one."""


async def find_endpoint(client: RequestClient, name: str) -> EndpointRecord:
    """Return the record of an endpoint, once the client's snapshot has it.

    Raises:
        EndpointNotFound: there is no such endpoint.
        BrokerUnavailable: Redis cannot be reached.
    """
    endpoint = client.snapshot.endpoints.get(name)
    if endpoint is None:
        # The snapshot follows the registry with a short delay.
        newest = await client.registry.snapshot()
        if (endpoint := newest.endpoints.get(name)) is None:
            raise EndpointNotFound(name, newest.endpoints)
        await client.watcher.wait_for(newest.version, _SNAPSHOT_TIMEOUT_S)
    return endpoint


async def default_window(client: RequestClient, tags: Iterable[str]) -> int:
    """Return four times the number of items that the replicas of some backends can run at once.

    It is at least 1,000, but at most half of the limits of the backends' queues.

    Raises:
        BrokerUnavailable: Redis cannot be reached.
    """
    backends = client.snapshot.backends
    replicas = await client.registry.get_reports(ReplicaReport)
    concurrency = limit = 0
    for tag in tags:
        if (backend := backends.get(tag)) is None:
            continue
        ready = sum(report.backend == tag for report in replicas.values())
        batch_size: int = backend.config.max_batch_size or 0
        calls: int = backend.config.max_concurrent_queries or (2 if batch_size else _DEFAULT_CONCURRENCY)
        concurrency += max(1, ready) * calls * max(1, batch_size)
        limit += queue_limits(backend).requests // 2
    return max(1, min(max(_MIN_WINDOW, 4 * concurrency), limit))


class _ItemCall(Call):
    """The call of one item, created once however often it is sent."""

    __slots__ = ("expires_s", "index", "options", "pipeline", "size_bytes")

    def __init__(
        self, pipeline: BatchPipeline, client: RequestClient, id_: str, raw: RawEntry, index: int, item: EncodedItem
    ) -> None:
        size, large = len(item.body), item.body if raw.body is None else b""
        # Without an ``on_outcome`` of its own, which would lead back here: there are many items.
        super().__init__(client.in_flight, id_, raw, _ignore, body=large, batch=True)
        self.pipeline, self.index, self.options, self.size_bytes = pipeline, index, item.options, size
        timeout_s = item.options.timeout_s
        self.expires_s = None if timeout_s is None else client.loop.time() + timeout_s

    def conclude(self, outcome: Reply | BaseException) -> None:
        try:
            self.pipeline.on_outcome(self, outcome)
        except Exception as e:
            self.pipeline.fail(e)


class BatchPipeline:
    """Sends the items of one batch and collects the results, from `start` to `stop`."""

    def __init__(
        self,
        client: RequestClient,
        endpoint: str,
        options: CallOptions,
        window: int,
        *,
        job: JobProgress | None,
        skip: Container[int],
        in_order: bool,
        on_results: Callable[[], None],
        on_want: Callable[[int], None],
    ) -> None:
        """Create a pipeline that has not sent anything.

        Args:
            client: publishes the items.
            endpoint: name of the endpoint.
            options: options of items that have none of their own.
            window: the most items in flight, and results that have not been taken.
            job: the job that the batch belongs to.
            skip: indices of items that are not sent, and whose results are not wanted.
            in_order: the user takes the results in the order of the items.
            on_results: called when there are ``results``, when the batch is over, and when it has failed.
            on_want: called with a number of items that there is room for. `feed` is the answer.
        """
        self._client, self._endpoint = client, endpoint
        self._encoder = ItemEncoder(client, endpoint, options)
        self._window, self._job, self._skip, self._in_order = window, job, skip, in_order
        self._on_results, self._on_want = on_results, on_want
        self.results: deque[BatchResult] = deque()
        """Results that the user has not taken. Another thread may remove them, from the left."""
        self.failure: BaseException | None = None
        """Why the batch cannot continue."""
        self._next_index = 0
        self._has_all_items = False
        self._awaits_items = False
        """Whether ``on_want`` has been called and not answered."""
        self._has_started = False
        self._announces = False
        """Whether ``on_results`` will be called in this loop tick."""
        self._in_flight: dict[int, _ItemCall] = {}
        """The items without a result, by index, those that wait for a retry included."""
        self._bytes = 0
        self._refused: deque[_ItemCall] = deque()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._unavailable_since_s: float | None = None
        self._retried = 0
        self._last_result_s = client.loop.time()
        self._untaken = 0
        self.done = self.errors = 0
        """Items that have a result or need none, and those whose result is an error."""

    @property
    def in_flight(self) -> int:
        """Items that were sent and have no result."""
        return len(self._in_flight)

    @property
    def total(self) -> int | None:
        """The number of all items; None while the input has not ended."""
        return self._next_index if self._has_all_items else None

    @property
    def is_over(self) -> bool:
        """Whether no more results will come."""
        return self._has_all_items and not self._in_flight and not (self._job and self._job.has_unverified)

    async def start(self) -> None:
        """Collect the results that a job has already, then request items.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        if self._job is not None:
            await self._job.read_results(self._deliver)
        self._has_started = True
        self._request_items()

    def stop(self) -> None:
        """Cancel the items in flight. Those of a job stay on their streams."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        if self._job is None:
            for call in self._in_flight.values():
                call.cancel()
        self._in_flight.clear()

    def fail(self, error: BaseException) -> None:
        """Record that the batch cannot continue. The first error counts."""
        if self.failure is None:
            self.failure = error
            self._on_results()

    async def progress(self) -> BatchProgress:
        """Return how the batch is doing. Redis is asked for replicas only when no result has come for a while."""
        waits_for: WaitsFor | None = None
        if self._unavailable_since_s is not None:
            waits_for = "broker"
        elif self._in_flight and self._client.loop.time() - self._last_result_s > _SILENCE_S:
            waits_for = await self._cause_of_silence()
        if waits_for is None and self._refused:
            waits_for = "queue"
        return BatchProgress(len(self._in_flight), self._retried, waits_for)

    async def _cause_of_silence(self) -> WaitsFor | None:
        endpoint = self._client.snapshot.endpoints.get(self._endpoint)
        tags = () if endpoint is None else endpoint.traffic
        try:
            replicas = await asyncio.wait_for(self._client.registry.get_reports(ReplicaReport), _SILENCE_S)
        except (asyncio.TimeoutError, BrokerUnavailable):
            return "broker"
        is_served = any(report.backend in tags and report.state == "ready" for report in replicas.values())
        return None if is_served else "replicas"

    # -- items

    def feed(self, items: Iterable[Any], *, is_last: bool = False) -> None:
        """Send the items that were requested, or fewer. ``is_last``: the input ends behind them.

        Raises:
            ConfigError: the items are not those of the job.
        """
        self._awaits_items = False
        if self._job is None:
            for value in items:
                self._submit(self._encoder.encode(value))
        else:
            encoded = [self._encoder.encode(value) for value in items]
            self._job.add_rows(encoded, self.fail, is_last=is_last)
            for item in encoded:
                self._submit(item)
            for result in self._job.pop_verified():
                self._pass_on(result)
        if is_last:
            self._has_all_items = True
            self._on_results()
        else:
            self._request_items()

    def on_taken(self, results: Sequence[BatchResult]) -> None:
        """Record that the user has taken these results, so that there is room for as many items."""
        self._untaken -= len(results)
        if self._job is not None:
            self._job.on_taken(results)
            self._job.bound_backlog(self._untaken, self._window, in_order=self._in_order)
        self._request_items()

    def checkpoint(self) -> None:
        """Delete the results of the job that the user has taken."""
        if self._job is not None:
            self._job.delete_taken_results()

    def _request_items(self) -> None:
        if not self._has_started or self._awaits_items or self._has_all_items:
            return
        if self._refused or self.failure is not None:
            return
        room = self._window - len(self._in_flight) - self._untaken
        if self._job is not None and self._job.has_unverified:
            room = max(room, _CHUNK)  # until their rows arrive, these results take up the room for rows
        elif self._bytes > _MAX_BYTES:
            return
        if room >= min(_CHUNK, max(1, self._window // 4)):
            self._awaits_items = True
            self._on_want(min(room, _CHUNK))

    def _submit(self, item: EncodedItem) -> None:
        """Send the next item, unless its result is there or not wanted."""
        index = self._next_index
        self._next_index += 1
        job = self._job
        if index in self._skip:
            self.done += 1
            return
        if job is not None and not job.needs(index):
            return
        try:
            call = self._call_of(index, item)
        except Exception as e:
            self._deliver(index, BatchResult(index, error=e))
            return
        self._in_flight[index] = call
        self._bytes += call.size_bytes
        self._send(call)

    def _call_of(self, index: int, item: EncodedItem) -> _ItemCall:
        if item.error is not None:
            raise item.error
        client, timeout_s = self._client, item.options.timeout_s
        check_size(item.body, client.longest if len(item.body) > LEAST_LARGE else None)
        id_ = client.next_id() if self._job is None else self._job.id_of(index)
        raw = self._encoder.request(id_, item, 0 if timeout_s is None else client.deadline_ms(timeout_s))
        return _ItemCall(self, client, id_, raw, index, item)

    def _send(self, call: _ItemCall) -> None:
        """Publish an item, for the first time or again."""
        timeout_s = None
        if call.expires_s is not None and (timeout_s := call.expires_s - self._client.loop.time()) <= 0:
            self.on_outcome(call, RequestTimeout(f"endpoint {self._endpoint!r}", call.options.timeout_s or 0.0))
            return
        entry = None
        if self._job is not None and (published := self._job.pop_published(call.index)) is not None:
            call.backend, entry = published
        client = self._client
        snapshot = client.snapshot
        try:
            backend = snapshot.backends.get(call.backend)  # an item that was refused goes to the same backend
            if backend is None:
                endpoint = snapshot.endpoints.get(self._endpoint)
                if endpoint is None:
                    raise EndpointNotFound(self._endpoint, snapshot.endpoints)
                check_call_method(endpoint, call.options.method_name)
                backend, entry = client.select_backend(endpoint, call.options.shard_key), None
                if endpoint.shadows:
                    header, body = Header.load(call.raw.header), call.body or call.raw.body or b""
                    client.shadows.publish(endpoint, header, body, batch=True)
            client.start(call, backend, timeout_s, entry)
        except PenstockError as e:
            self.on_outcome(call, e)

    # -- outcomes

    def on_outcome(self, call: _ItemCall, outcome: Reply | BaseException) -> None:
        """Process the outcome of an item: a result, a refusal after which it is sent again, or the batch's failure."""
        if self._in_flight.get(call.index) is not call:
            return
        if isinstance(outcome, Reply):
            self._unavailable_since_s = None
            self._deliver(call.index, read_result(call.index, outcome))
            if self._refused:  # the queue has room for one
                self._retried += 1
                self._send(self._refused.popleft())
        elif isinstance(outcome, Overloaded):
            self._unavailable_since_s = None
            # Sooner than an HTTP client would: the batch has items for every slot that becomes free.
            self._retry_later(call, min(outcome.retry_after_s, _MAX_RETRY_S))
        elif isinstance(outcome, BrokerUnavailable) and not self._client.closed:
            now_s = self._client.loop.time()
            if self._unavailable_since_s is None:
                self._unavailable_since_s = now_s
            if now_s - self._unavailable_since_s > _MAX_OUTAGE_S:
                self.fail(outcome)
            else:
                self._retry_later(call, outcome.retry_after_s)
        elif isinstance(outcome, NotPermitted):
            self.fail(outcome)  # every other item would fail alike
        elif isinstance(outcome, Exception):
            self._deliver(call.index, BatchResult(call.index, error=outcome))
        else:
            self.fail(outcome)

    def _retry_later(self, call: _ItemCall, after_s: float) -> None:
        self._refused.append(call)
        if self._retry_timer is None:
            self._retry_timer = self._client.loop.call_later(after_s, self._retry_refused)

    def _retry_refused(self) -> None:
        self._retry_timer = None
        refused, self._refused = self._refused, deque()
        self._retried += len(refused)
        for call in refused:
            self._send(call)
        self._request_items()

    def _deliver(self, index: int, result: BatchResult) -> None:
        """Pass a result on, or leave it with the job until its row is verified."""
        if self._job is None or self._job.record(result):
            self._pass_on(result)
        elif not self._job.needs(index):
            self._forget_call(index)

    def _pass_on(self, result: BatchResult) -> None:
        self._untaken += 1
        self.done += 1
        if result.error is not None:
            self.errors += 1
        # In this order, as another thread may read both: an item is in flight until its result is among the results.
        self.results.append(result)
        self._forget_call(result.index)
        if not self._announces:
            # Once for all results of one read.
            self._announces = True
            self._last_result_s = self._client.loop.time()
            self._client.loop.call_soon(self._announce)
        if self._job is not None:
            self._job.bound_backlog(self._untaken, self._window, in_order=self._in_order)

    def _forget_call(self, index: int) -> None:
        if (call := self._in_flight.pop(index, None)) is not None:
            self._bytes -= call.size_bytes

    def _announce(self) -> None:
        self._announces = False
        self._on_results()


def _ignore(outcome: object) -> None:
    """`_ItemCall.conclude` passes the outcome on."""
