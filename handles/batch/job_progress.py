"""Progress of a batch job: its input, the results that it has, and the items that earlier producers have published.

A job is named; its results outlive the producer. A producer that continues a job reads the results that are there,
waits for those of items that are still queued, and sends only the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...broker.queue.batch_jobs import SECRET
from ...broker.wire.call_ids import ItemIds
from ...broker.wire.entry_ref import order_of
from ...broker.wire.replies import Reply
from ..calls.reply_receiver import OnReply
from ..errors import NotPermitted
from ..replies.response import Response
from .encoding import EncodedItem, allows_pickle
from .items import BatchResult, Indices, read_result
from .job_client import JobClient
from .job_input import Block, InputChain, dump_names, load_names, other_input, put_in_order

log = logging.getLogger(__name__)

_ROWS, _DIGEST, _LAST, _NAMES = b"rows", b"digest", b"last", b"names"


@dataclass(frozen=True, slots=True)
class JobSource:
    """The input of a job apart from its rows, and how to continue."""

    name: str = ""
    """Name of the file or directory; empty for a Python iterable."""
    names: list[str] | None = None
    """Names of the files, if the items are the files of a directory. Opening the job sorts the list in place: files of
    an earlier run in their order then, followed by new ones.
    """
    restart_job: bool = False
    """Delete the data of the job, and begin anew."""
    on_restart: Callable[[], None] | None = None
    """Called before the job is deleted, to delete its data elsewhere."""
    retry_errors: bool = False
    """Run the items again that failed when the job ran before."""


async def open_job(
    client: JobClient, endpoint: str, method_name: str, source: JobSource, skip: Container[int]
) -> JobProgress:
    """Acquire a job, and find out how far it has come.

    Args:
        client: the client of the job, connected.
        endpoint: name of the endpoint.
        method_name: method of the backend's class.
        source: the input.
        skip: indices of items whose results the caller has already.

    Raises:
        ConfigError: another producer works on the job, or it belongs to another input, endpoint or method.
        BrokerUnavailable: Redis cannot be reached.
    """
    job = client.job
    await job.acquire()
    if source.restart_job:
        for backend, entry in (await client.published_items()).values():
            client.withdraw(backend, entry)
        if source.on_restart is not None:
            source.on_restart()
        await job.forget()
    described = {"endpoint": endpoint, "method": method_name, "source": source.name}
    record = await job.describe(described)
    for name, value in described.items():
        if name in record and record[name] != value:
            raise other_input(job.name, f"it began with the {name} {record[name]!r}, and this is {value!r}")
    noted = await job.read_input()
    blocks = [Block(int(fields[_ROWS]), fields[_DIGEST], _LAST in fields) for fields in noted if _ROWS in fields]
    chain = InputChain(job.name, blocks, may_grow=source.names is not None)
    new_names: list[str] = []
    if source.names is not None:
        known = [name for fields in noted if _NAMES in fields for name in load_names(fields[_NAMES])]
        new_names = put_in_order(job.name, source.names, known)
    item_ids = ItemIds(bytes.fromhex(record[SECRET]))
    # The queued items first, the results later: an item that is settled in between has its result among those.
    published = await client.published_items()
    indices = {id_: item_ids.index_of(id_) for id_ in published}
    return JobProgress(
        client,
        endpoint,
        chain,
        item_ids,
        {index: published[id_] for id_, index in indices.items() if index is not None},
        new_names,
        skip=skip,
        retry_errors=source.retry_errors,
    )


class JobProgress:
    """The state of a job's items, for the one producer that works on it. Made by `open_job`."""

    def __init__(
        self,
        client: JobClient,
        endpoint: str,
        chain: InputChain,
        item_ids: ItemIds,
        published: dict[int, tuple[str, bytes]],
        new_names: Sequence[str],
        *,
        skip: Container[int],
        retry_errors: bool,
    ) -> None:
        """Create it from the state that `open_job` read.

        Args:
            client: the client of the job.
            endpoint: name of the endpoint.
            chain: the input.
            item_ids: the ids of the requests, by index.
            published: backend and entry of each item that an earlier producer has published, by index.
            new_names: names of files that are new in the input.
            skip: indices of items whose results are not wanted.
            retry_errors: drop the results of items that failed.
        """
        self._client, self._endpoint, self._chain, self._item_ids = client, endpoint, chain, item_ids
        self._published, self._new_names = published, new_names
        self._skip, self._retry_errors = skip, retry_errors
        self._done = Indices()
        """Items whose results have been passed on."""
        self._unverified: dict[int, BatchResult] = {}
        """Results of rows of which it is not known yet whether they belong to this input."""
        self._places: dict[int, bytes] = {}
        """Entry ids of results that have been passed on and not been taken, by index."""
        self._last_result = b""
        """Entry id of the last result."""
        self._is_paused = False

    @property
    def has_unverified(self) -> bool:
        """Whether there are results that wait for their rows."""
        return bool(self._unverified)

    def id_of(self, index: int) -> str:
        """Return the id of an item's request."""
        return self._item_ids.id_of(index)

    def needs(self, index: int) -> bool:
        """Return whether an item has no result yet."""
        return index not in self._done and index not in self._unverified

    def pop_published(self, index: int) -> tuple[str, bytes] | None:
        """Return backend and entry of an item that an earlier producer has published, the first time it is called."""
        return self._published.pop(index, None)

    async def read_results(self, on_result: Callable[[int, BatchResult], None]) -> None:
        """Pass all results that are there to ``on_result``, then return. Later results of earlier producers follow."""
        self._client.read_results(partial(self._find_receiver, on_result))
        await self._client.drain_replies()

    def add_rows(self, rows: Iterable[EncodedItem], on_failure: Callable[[Exception], None], *, is_last: bool) -> None:
        """Compare the next rows with the input of the job, and store their hash before any of them is sent.

        Args:
            rows: the rows.
            on_failure: called when the hash cannot be stored because the Redis user lacks the permission.
            is_last: the input ends behind them.

        Raises:
            ConfigError: the rows are not those of the job.
        """
        on_noted = partial(_on_noted, on_failure)
        if self._new_names:
            self._client.job.note_input(on_noted, {"names": dump_names(self._new_names)})
            self._new_names = ()
        for row in rows:
            self._chain.add(row.fingerprint())
        if is_last:
            self._chain.end()
        if (block := self._chain.block(is_last=is_last)) is not None:
            fields = {"rows": b"%d" % block.rows, "digest": block.digest}
            self._client.job.note_input(on_noted, {**fields, "last": b"1"} if block.is_last else fields)

    def pop_verified(self) -> list[BatchResult]:
        """Return the results whose rows are now known to belong to this input."""
        if not self._unverified:
            return []
        indices = [index for index in self._unverified if index < self._chain.verified]
        self._done.update(indices)
        return [self._unverified.pop(index) for index in indices]

    def record(self, result: BatchResult) -> bool:
        """Record a result that has just been read. Return whether to pass it on now.

        It is not passed on if the item has a result already, or if its row is not verified yet: `pop_verified` returns
        it then.
        """
        index = result.index
        self._published.pop(index, None)
        if index in self._skip or not self.needs(index):
            return False
        self._places[index] = self._last_result = self._client.results.ref
        if index >= self._chain.verified:
            self._unverified[index] = result
            return False
        self._done.add(index)
        return True

    def on_taken(self, results: Iterable[BatchResult]) -> None:
        """Record that the user has taken these results."""
        for result in results:
            self._places.pop(result.index, None)

    def bound_backlog(self, untaken: int, window: int, *, in_order: bool) -> None:
        """Pause reading while the user has more than two windows of results to take; resume below one.

        In order, the next result may lie behind all that have been read, so reading goes on.
        """
        if self._is_paused:
            if untaken < window:
                self._is_paused = False
                self._client.results.resume()
        elif not in_order and untaken > 2 * window > 0:
            self._is_paused = True
            self._client.results.pause()

    def delete_taken_results(self) -> None:
        """Delete the results that have been taken, and are stored elsewhere."""
        results = self._client.results
        if self._places:
            # The places of the others are in no order: only entries before all of them can be deleted.
            oldest = min(self._places.values(), key=order_of)
            time_ms, sequence = order_of(oldest)
            if sequence > 0:
                results.forget(b"%d-%d" % (time_ms, sequence - 1))
            elif time_ms > 0:
                results.forget(b"%d-%d" % (time_ms - 1, 2**64 - 2))
        elif self._last_result:
            results.forget(self._last_result)

    def _find_receiver(self, on_result: Callable[[int, BatchResult], None], call_id: str) -> OnReply | None:
        index = self._item_ids.index_of(call_id)
        return None if index is None else partial(self._on_reply, on_result, index)

    def _on_reply(
        self, on_result: Callable[[int, BatchResult], None], index: int, outcome: Reply | BaseException
    ) -> None:
        """Process the reply to an item that an earlier producer has published."""
        if not isinstance(outcome, Reply):
            log.warning("a result of the job is lost, and its item is sent again: %s", outcome)
        elif outcome.codec == "pickle" and not allows_pickle(self._client.snapshot, self._endpoint):
            # The reply does not name its backend, so all backends of the endpoint must allow it.
            log.warning("a result of the job is pickled and was not read, and its item is sent again")
        else:
            result = read_result(index, outcome)
            if self._retry_errors and _has_failed(result):
                self._client.results.drop(self._client.results.ref)  # the next result of the item takes its place
                return
            on_result(index, result)


def _has_failed(result: BatchResult) -> bool:
    value: Any = result.value
    return result.error is not None or (isinstance(value, Response) and value.status_code >= 400)


def _on_noted(on_failure: Callable[[Exception], None], reply: Any) -> None:
    if isinstance(reply, NotPermitted):
        on_failure(reply)
    elif isinstance(reply, Exception):
        log.warning("cannot store a hash of the job's input: %s", reply)
