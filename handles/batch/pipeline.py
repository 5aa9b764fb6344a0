"""The pipeline of a batch: a bounded window of items in flight, with retries of refused ones.

This is the core of both faces of `BatchProducer`, in the loop of its caller. It asks for items when it has room for
them, so that memory stays flat however many there are, and whoever holds the items decides how to iterate over them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Union, cast

from ...broker.queue.batch_jobs import SECRET
from ...broker.wire import exact_json
from ...broker.wire._fields import LARGE
from ...broker.wire.call_ids import ItemIds
from ...broker.wire.entry_ref import order_of
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header, RawEntry
from ..calls.call import MAX_QUEUED, Call
from ..calls.large_bodies import check_size
from ..calls.request_client import RequestClient
from ..codec import encode, load_json
from ..errors import BrokerUnavailable, EndpointNotFound, NotPermitted, Overloaded, PenstockError, RequestTimeout
from ..options import CallOptions, check_call_method
from ..response import Response, value_of
from .items import BatchItem, BatchResult, Indices
from .job_input import Block, InputChain, dump_names, load_names, other_input, put_in_order

log = logging.getLogger(__name__)

_ROWS, _DIGEST, _LAST, _NAMES = b"rows", b"digest", b"last", b"names"
_LEAST_WINDOW = 1_000
_MOST_BYTES = 64 * 1024 * 1024
"""Of bodies in flight: the window is smaller where items are large."""
_CHUNK = 64
_PATIENCE_S = 60.0
_RETRY_S = 1.0
_FOLLOW_S = 10.0
_CONCURRENCY = 16
"""What a replica is taken to run at a time where nothing says how much."""


class _Item(Call):
    """An item until its result: the call that carries it, made once however often it is sent."""

    __slots__ = ("ends", "index", "options", "production", "size")

    def __init__(
        self,
        production: BatchPipeline,
        caller: RequestClient,
        id_: str,
        raw: RawEntry,
        index: int,
        options: CallOptions,
    ) -> None:
        # It has no continuation: that would hold it, and there are many.
        super().__init__(caller.in_flight, id_, raw, _nobody)
        self.batch = True
        self.production, self.index, self.options = production, index, options
        self.ends: float | None = None
        self.size = 0

    def conclude(self, outcome: Reply | BaseException) -> None:
        try:
            self.production.hear(self, outcome)
        except Exception as e:
            self.production.fail(e)


@dataclass(frozen=True, slots=True)
class JobSource:
    """Which input a job is to have, apart from its rows."""

    name: str = ""
    """Of the file or directory; none for a Python iterable."""
    names: list[str] | None = None
    """Of the files of a directory, where the items are these: they are put into the order that they had before, new
    ones behind them.
    """
    restart_job: bool = False
    """Forget what the job had, and begin anew."""
    on_restart: Callable[[], None] | None = None
    """Called before the job is forgotten, to delete what is stored of it elsewhere."""
    retry_errors: bool = False
    """Run again what failed when the job ran before."""


_Encoded = tuple[CallOptions, Union[str, dict[str, Any]], str, bytes, Union[Exception, None]]  # noqa: UP007 - evaluated
"""An item as it is sent, by options, query, codec and body; or why it cannot be. Plain, as each item makes one."""


def _fingerprint(row: _Encoded) -> bytes:
    """Return what is hashed of an item."""
    options, query, codec, body, error = row
    if error is not None:
        return f"{type(error).__name__}: {error}".encode(errors="surrogatepass")
    if codec == "pickle":
        body = b""  # pickling the same set twice may give other bytes
    if not query and options.method_name == "__call__":
        return b"%b:%b" % (codec.encode(), body)
    return b"%b:%b" % (exact_json.dumps([query, options.method_name, codec]), body)


class BatchPipeline:
    """One batch, from `open` to `close`.

    ``on_results`` is called when `results` has some again, ``on_want`` with a number of items that there is room for;
    `feed` answers that. Items whose index is in ``skip`` are passed over, and so are results of theirs.
    """

    def __init__(
        self,
        caller: RequestClient,
        endpoint: str,
        options: CallOptions,
        window: int | None,
        *,
        skip: Container[int],
        in_order: bool,
        on_results: Callable[[], None],
        on_want: Callable[[int], None],
        source: JobSource = JobSource(),
    ) -> None:
        self._source = source
        self._input: InputChain | None = None
        """Of a job, once it is this producer's."""
        self._held: dict[int, BatchResult] = {}
        """Of a job: results of rows that are not known yet to be those of this input."""
        self._caller, self._endpoint, self._options = caller, endpoint, options
        self._window = window or 0
        self._skip, self._in_order = skip, in_order
        self._on_results, self._on_want = on_results, on_want
        self._loop = asyncio.get_running_loop()
        self.results: deque[BatchResult] = deque()
        self.failure: BaseException | None = None
        """Why the batch cannot go on."""
        self._next = 0
        self._exhausted = False
        self._wanting = self._begun = self._announcing = False
        self._last_header: tuple[tuple[object, ...], bytes] = ((), b"")
        self._in_flight: dict[int, _Item] = {}
        self._bytes = 0
        self._refused: deque[_Item] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._unreachable_since: float | None = None
        self._unyielded = 0
        self._seen = Indices()
        """Of a job: what has a result."""
        self._accepted: dict[int, tuple[str, bytes]] = {}
        """Of a job: what a former producer has put on a batch stream."""
        self._places: dict[int, bytes] = {}
        self._forgettable = b""
        self._paused = False
        self._record: dict[str, Any] = {}
        self._item_ids: ItemIds | None = None
        """Of a job, once it is this producer's."""
        if caller.results is None:
            caller.use()

    @property
    def over(self) -> bool:
        """Whether there is nothing to come any more."""
        return self._exhausted and not self._in_flight and not self._held

    async def open(self) -> None:
        """Find the endpoint, and what a former producer of the job has left; then ask for items.

        Raises:
            EndpointNotFound: there is no such endpoint.
            ConfigError: the job has another producer, or is another endpoint's.
            BrokerUnavailable: Redis cannot be reached.
        """
        endpoint = self._caller.snapshot.endpoints.get(self._endpoint)
        if endpoint is None:
            # What we follow may be a moment behind.
            seen = await self._caller.registry.snapshot()
            if (endpoint := seen.endpoints.get(self._endpoint)) is None:
                raise EndpointNotFound(self._endpoint, seen.endpoints)
            await self._caller.watcher.wait_for(seen.version, _FOLLOW_S)
        if not self._window:
            self._window = await self._default_window(endpoint.traffic)
        if self._caller.job is not None:
            await self._caller.job.take()
            if self._source.restart_job:
                await self._forget_job()
            await self._open_input()
            record = self._record
            self._item_ids = ItemIds(bytes.fromhex(record[SECRET]))
            self._caller.receiver.stray = self._stray
            assert self._caller.results is not None
            self._caller.results.resume()
            # In this order: what was settled since we looked has its result among those that we then wait for.
            accepted = await self._caller.accepted_before(self._caller.snapshot.backends)
            indices = {id_: self._item_ids.index_of(id_) for id_ in accepted}
            self._accepted = {index: accepted[id_] for id_, index in indices.items() if index is not None}
            await self._caller.drain()
        self._begun = True
        self._ask()

    async def _forget_job(self) -> None:
        job = self._caller.job
        assert job is not None
        for backend, entry in (await self._caller.accepted_before(self._caller.snapshot.backends)).values():
            self._caller.withdraw(backend, entry)
        if self._source.on_restart is not None:
            self._source.on_restart()
        await job.forget()

    async def _open_input(self) -> None:
        """Find out which input the job belongs to. Raises ``ConfigError``: it is another one's."""
        job, source = self._caller.job, self._source
        assert job is not None
        described = {"endpoint": self._endpoint, "method": self._options.method_name, "source": source.name}
        self._record = record = await job.describe(described)
        for what, value in described.items():
            if what in record and record[what] != value:
                raise other_input(job.name, f"it began with the {what} {record[what]!r}, and this is {value!r}")
        noted = await job.read_input()
        blocks = [Block(int(fields[_ROWS]), fields[_DIGEST], _LAST in fields) for fields in noted if _ROWS in fields]
        self._input = InputChain(job.name, blocks, may_grow=source.names is not None)
        if source.names is not None:
            known = [name for fields in noted if _NAMES in fields for name in load_names(fields[_NAMES])]
            if new := put_in_order(job.name, source.names, known):
                job.note_input(self._on_noted, {"names": dump_names(new)})

    def _note_input(self, *, is_last: bool = False) -> None:
        """Keep what the job's input is up to here, before any of these rows is sent."""
        assert self._input is not None
        assert self._caller.job is not None
        if (block := self._input.block(is_last=is_last)) is not None:
            fields = {"rows": b"%d" % block.rows, "digest": block.digest}
            self._caller.job.note_input(self._on_noted, {**fields, "last": b"1"} if block.is_last else fields)

    def _on_noted(self, reply: Any) -> None:
        if isinstance(reply, NotPermitted):
            self.fail(reply)
        elif isinstance(reply, Exception):
            log.warning("cannot keep which input the job has: %s", reply)

    async def close(self) -> None:
        """Give up what is in flight. What a job has on its streams stays there."""
        if self._retry is not None:
            self._retry.cancel()
        if self._caller.job is not None:
            self._caller.receiver.stray = None
            self._in_flight.clear()
            await self._caller.job.leave()
            await self._caller.close()
            return
        for item in self._in_flight.values():
            item.cancel()
        self._in_flight.clear()
        self._caller.release()

    async def _default_window(self, tags: Iterable[str]) -> int:
        """Return four times what the replicas can hold at once, but no more than half of what queues may."""
        backends = self._caller.snapshot.backends
        replicas = await self._caller.registry.reports("replicas")
        held = most = 0
        for tag in tags:
            if (backend := backends.get(tag)) is None:
                continue
            config = backend.config
            ready = sum(report.get("backend") == tag for report in replicas.values())
            size: int = config.get("max_batch_size") or 0
            at_once: int = config.get("max_concurrent_queries") or (2 if size else _CONCURRENCY)
            held += max(1, ready) * at_once * max(1, size)
            most += config.get("max_queued_requests", MAX_QUEUED) // 2
        return max(1, min(max(_LEAST_WINDOW, 4 * held), most))

    # -- items

    def feed(self, items: Iterable[Any], *, last: bool = False) -> None:
        """Take what was asked for, or less; ``last`` if there are no more."""
        self._wanting = False
        if self._input is None:
            for value in items:
                index = self._next
                self._next += 1
                if index not in self._skip:
                    self._submit(index, self._encoded(value))
        else:
            self._feed_job(self._input, items, last=last)
        if last:
            self._exhausted = True
            self._on_results()
        else:
            self._ask()

    def _feed_job(self, chain: InputChain, items: Iterable[Any], *, last: bool) -> None:
        rows = [self._encoded(value) for value in items]
        for row in rows:
            chain.add(_fingerprint(row))
        if last:
            chain.end()
        self._note_input(is_last=last)
        for row in rows:
            index = self._next
            self._next += 1
            if index not in self._skip and index not in self._seen and index not in self._held:
                self._submit(index, row)
        if self._held:
            for index in [index for index in self._held if index < chain.verified]:
                self._deliver_known(index, self._held.pop(index))

    def took(self, results: Sequence[BatchResult]) -> None:
        """Hear that these are somebody else's now."""
        self._unyielded -= len(results)
        if self._places:
            for result in results:
                self._places.pop(result.index, None)
        if self._paused and self._caller.results is not None and self._unyielded < self._window:
            self._paused = False
            self._caller.results.resume()
        self._ask()

    def fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self._on_results()

    def forget_results(self) -> None:
        """Delete the job's results that have been taken: whoever took them has them safe."""
        results = self._caller.results
        if results is None:
            return
        if self._places:
            # What is still to be taken may lie anywhere: only what is before all of it may go.
            oldest = min(self._places.values(), key=order_of)
            time_ms, sequence = order_of(oldest)
            if sequence > 0:
                results.forget(b"%d-%d" % (time_ms, sequence - 1))
            elif time_ms > 0:
                results.forget(b"%d-%d" % (time_ms - 1, 2**64 - 2))
        elif self._forgettable:
            results.forget(self._forgettable)

    def _ask(self) -> None:
        if self._wanting or self._exhausted or not self._begun or self._refused or self.failure is not None:
            return
        room = self._window - len(self._in_flight) - self._unyielded
        if self._held:  # until their rows come, nobody takes them
            room = max(room, _CHUNK)
        elif self._bytes > _MOST_BYTES:
            return
        # A few at a time cost as much as many.
        if room >= min(_CHUNK, max(1, self._window // 4)):
            self._wanting = True
            self._on_want(min(room, _CHUNK))

    def _submit(self, index: int, row: _Encoded) -> None:
        try:
            item = self._written(index, row)
        except Exception as e:
            self._deliver(index, BatchResult(index, error=e))
            return
        self._in_flight[index] = item
        self._bytes += item.size
        self._send(item)

    def _encoded(self, value: Any) -> _Encoded:
        options, query = self._options, ""
        try:
            if isinstance(value, Exception):
                raise value
            if isinstance(value, BatchItem):
                own = {"method_name": value.method_name, "shard_key": value.shard_key, "timeout_s": value.timeout_s}
                if changes := {name: value for name, value in own.items() if value is not None}:
                    options = options.with_(changes)
                if not isinstance(cast(object, value.query), Mapping):
                    raise TypeError(f"query must be a dict of JSON values, not {type(value.query).__name__}")
                if value.query:
                    query = load_json(exact_json.dumps(dict(value.query)))
                value = value.data
            try:
                codec, body = encode(value)
            except TypeError:
                if not self._takes_pickle():
                    raise
                codec, body = encode(value, allow_pickle=True)
        except Exception as e:  # whatever the value's own methods raise
            return options, query, "", b"", e
        return options, query, codec, body, None

    def _written(self, index: int, row: _Encoded) -> _Item:
        options, query, codec, body, error = row
        if error is not None:
            raise error
        caller, timeout_s = self._caller, options.timeout_s
        large = len(body) > LARGE
        check_size(body, caller.longest if large else None)
        id_ = caller.next_id() if self._item_ids is None else self._item_ids.id_of(index)
        deadline_ms = 0 if timeout_s is None else caller.deadline_ms(timeout_s)
        header = self._header(options, codec, query, deadline_ms)
        raw = RawEntry(id_.encode(), caller.name, header, None if large else body, len(body) if large else 0)
        item = _Item(self, caller, id_, raw, index, options)
        item.size = len(body)
        if large:
            item.body = body
        if timeout_s is not None:
            item.ends = self._loop.time() + timeout_s
        return item

    def _header(self, options: CallOptions, codec: str, query: str | dict[str, Any], deadline_ms: int) -> bytes:
        key = options, codec, deadline_ms
        if not query and key == self._last_header[0]:  # as a rule
            return self._last_header[1]
        header = Header(
            endpoint=self._endpoint,
            method=options.http_method.upper(),
            query=query,
            headers=[(name.lower(), value) for name, value in options.http_headers.items()],
            codec=codec,
            deadline_ms=deadline_ms,
            call=options.method_name,
        ).dump()
        if not query:
            self._last_header = key, header
        return header

    def _takes_pickle(self) -> bool:
        snapshot = self._caller.snapshot
        endpoint = snapshot.endpoints.get(self._endpoint)
        backends = [snapshot.backends.get(tag) for tag in (endpoint.traffic if endpoint else ())]
        return bool(backends) and all(backend and backend.config.get("allow_pickle") for backend in backends)

    def _send(self, item: _Item) -> None:
        timeout_s = None
        if item.ends is not None and (timeout_s := item.ends - self._loop.time()) <= 0:
            self.hear(item, RequestTimeout(f"endpoint {self._endpoint!r}", item.options.timeout_s or 0.0))
            return
        caller, entry = self._caller, None
        if self._accepted and item.index in self._accepted:
            item.backend, entry = self._accepted.pop(item.index)
        snapshot = caller.snapshot
        try:
            backend = snapshot.backends.get(item.backend)
            if backend is None:
                endpoint = snapshot.endpoints.get(self._endpoint)
                if endpoint is None:
                    raise EndpointNotFound(self._endpoint, snapshot.endpoints)
                check_call_method(endpoint, item.options.method_name)
                backend, entry = caller.choose(endpoint, item.options.shard_key), None
                if endpoint.shadows:
                    header, body = Header.load(item.raw.header), item.body or item.raw.body or b""
                    caller.shadows.send(endpoint, header, body, batch=True)
            caller.begin(item, backend, timeout_s, entry)
        except PenstockError as e:
            self.hear(item, e)

    # -- results

    def hear(self, item: _Item, outcome: Reply | BaseException) -> None:
        """Take what became of an item."""
        if self._in_flight.get(item.index) is not item:
            return
        if isinstance(outcome, Reply):
            self._unreachable_since = None
            self._deliver(item.index, _read(item.index, outcome))
            if self._refused:  # one place is free
                self._send(self._refused.popleft())
        elif isinstance(outcome, Overloaded):
            self._unreachable_since = None
            # Sooner than a client of the web: items are there to take the places that become free.
            self._try_again(item, min(outcome.retry_after_s, _RETRY_S))
        elif isinstance(outcome, BrokerUnavailable) and not self._caller.closed:
            now = self._loop.time()
            if self._unreachable_since is None:
                self._unreachable_since = now
            if now - self._unreachable_since > _PATIENCE_S:
                self.fail(outcome)
            else:
                self._try_again(item, outcome.retry_after_s)
        elif isinstance(outcome, NotPermitted):
            self.fail(outcome)  # as all the others would
        elif isinstance(outcome, Exception):
            self._deliver(item.index, BatchResult(item.index, error=outcome))
        else:
            self.fail(outcome)

    def _try_again(self, item: _Item, after_s: float) -> None:
        self._refused.append(item)
        if self._retry is None:
            self._retry = self._loop.call_later(after_s, self._retry_refused)

    def _retry_refused(self) -> None:
        self._retry = None
        refused, self._refused = self._refused, deque()
        for item in refused:
            self._send(item)
        self._ask()

    def _stray(self, call_id: str) -> Callable[[Reply | BaseException], None] | None:
        """Return who takes the result of an item that a former producer sent; None if the id is no item's."""
        assert self._item_ids is not None
        index = self._item_ids.index_of(call_id)
        return None if index is None else partial(self._on_stray, index)

    def _on_stray(self, index: int, outcome: Reply | BaseException) -> None:
        if not isinstance(outcome, Reply):
            log.warning("a result of the job is lost, and its item is sent again: %s", outcome)
        elif outcome.codec == "pickle" and not self._takes_pickle():
            # Which backend sent it is not known, so all that there are must allow it.
            log.warning("a result of the job is pickled and was not read, and its item is sent again")
        else:
            result = _read(index, outcome)
            has_failed = result.error is not None or (
                isinstance(result.value, Response) and result.value.status_code >= 400
            )
            if has_failed and self._source.retry_errors:
                assert self._caller.results is not None
                self._caller.results.drop(self._caller.results.ref)  # the item's next result takes its place
                return
            self._deliver(index, result)

    def _deliver(self, index: int, result: BatchResult) -> None:
        results = self._caller.results
        if results is not None:
            self._accepted.pop(index, None)
            if index in self._skip or index in self._seen or index in self._held:
                return
            self._places[index] = self._forgettable = results.ref
            if self._input is not None and index >= self._input.verified:
                self._held[index] = result
                self._land(index)
                return
        self._deliver_known(index, result)

    def _land(self, index: int) -> None:
        if (item := self._in_flight.pop(index, None)) is not None:
            self._bytes -= item.size

    def _deliver_known(self, index: int, result: BatchResult) -> None:
        results = self._caller.results
        if results is not None:
            self._seen.add(index)
        self._unyielded += 1
        # In this order, as another thread may look on: what is no longer in flight is among the results.
        self.results.append(result)
        self._land(index)
        if not self._announcing:
            # Once for all that come in one read.
            self._announcing = True
            self._loop.call_soon(self._announce)
        # In order, the next one may be behind all that has come.
        if results is not None and not self._in_order and not self._paused and self._unyielded > 2 * self._window > 0:
            self._paused = True
            results.pause()

    def _announce(self) -> None:
        self._announcing = False
        self._on_results()


def _read(index: int, reply: Reply) -> BatchResult:
    try:
        return BatchResult(index, value_of(reply))
    except Exception as e:
        return BatchResult(index, error=e)


def _nobody(outcome: object) -> None:
    """An item concludes itself."""
