"""Claims whose result is kept: it is stored and settled in one step, then sent to those who wait for it.

A streamed reply is gathered and kept whole. A replica that dies before the step leaves nothing of its run, so the
request runs again; after it, the request has its result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...broker.queue.group.reply_sender import ReplySender
from ...broker.registry.records import BackendSpec
from ...broker.results.keeping import Outcome, ResultWriter, Start
from ...broker.transport.connection import RedisConnection
from ...broker.wire import exact_json
from ...broker.wire._fields import LARGE
from ...broker.wire.entry_ref import id_of
from ...broker.wire.kept import CANCELLED, FAILED, IN_REDIS, SUCCEEDED, Piece, Result
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Part, Reply
from ...handles.errors import BackendError, PayloadTooLarge, PenstockError, RequestTimeout, from_wire, to_wire
from ..claim import Claim
from ..executing.stream_writer import StreamWriter
from .settlement import AlikeReplies, is_combined, send_combined

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.1
"""Progress that is reported more often than this is combined: the last value counts."""


_SHOW_START_S = 0.02
"""How long after its start the record of a request shows it, unless the request has ended by then."""

_STARTED_TOGETHER = 64
"""Most starts that are written by one script call."""


class KeptClaims:
    """The kept requests that one replica holds. Only for its event loop.

    Args:
        commands: the connection of the replica.
        keys: of the instance.
        replies: sends replies to callers.
        backend: tag of the backend.
        replica: tag of the replica.
        config: of the backend.
    """

    def __init__(
        self,
        commands: RedisConnection,
        keys: Keys,
        replies: ReplySender,
        backend: str,
        replica: str,
        config: BackendSpec,
    ) -> None:
        self._commands, self._keys, self._replies = commands, keys, replies
        self._backend, self._replica = backend, replica
        self._writer = ResultWriter(commands, keys, backend, replica)
        self.apply(config)
        self._gathered: dict[bytes, _GatheredReply] = {}
        """By entry refs."""
        self._started: dict[Claim, Start] = {}
        """Starts that are not written yet."""
        self._starting: asyncio.TimerHandle | None = None
        self._progress: dict[str, bytes] = {}
        """By request ids: progress that is reported and not written yet."""
        self._reporting: asyncio.TimerHandle | None = None
        self._alike: AlikeReplies = {}
        """Small replies of this loop tick."""
        self._is_closed = False

    def apply(self, config: BackendSpec) -> None:
        """Use the limits of a backend's configuration from now on."""
        self._ttl_ms, self._max_bytes = int(config.result_ttl_s * 1000), config.max_result_bytes

    def close(self) -> None:
        """Store no more results: the requests that run are redelivered."""
        self._is_closed = True
        for timer in (self._reporting, self._starting):
            if timer is not None:
                timer.cancel()
        for gathered in list(self._gathered.values()):
            gathered.writer.stop()

    async def sweep(self) -> None:
        """Delete the count of results that have expired. Raises `BrokerUnavailable` or `BrokerRefused`."""
        await self._writer.sweep()

    def start(self, claims: Sequence[Claim]) -> None:
        """Record that requests run; of ``claims``, those that are kept.

        The record shows it a moment later, so that the end of a quick request writes both.
        """
        for claim in claims:
            if claim.entry.keep_bytes is None:
                continue
            now_ms = int(self._commands.now_ms())
            if (start := self._started.get(claim)) is not None:
                start.started_ms = now_ms
                start.attempts += 1
            else:
                self._started[claim] = Start(now_ms, int(not claim.was_started))
            claim.was_started = True
            if self._starting is None:
                self._starting = asyncio.get_running_loop().call_later(_SHOW_START_S, self._write_started)

    def _write_started(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        started = [(claim.entry.id, start) for claim, start in self._started.items() if not claim.is_released]
        self._started.clear()
        for at in range(0, len(started), _STARTED_TOGETHER):
            self._writer.start(started[at : at + _STARTED_TOGETHER])

    def report(self, claim: Claim, progress: bytes) -> None:
        """Record the progress that the code of a running request reports, as JSON."""
        if self._is_closed or claim.is_released:
            return
        self._progress[claim.entry.id] = progress
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(_REPORT_EVERY_S, self._write_progress)

    def _write_progress(self) -> None:
        self._reporting = None
        self._write_started()  # only a running request has progress
        progress, self._progress = self._progress, {}
        for id_, value in progress.items():
            self._writer.report(id_, value)

    # -- streamed replies

    def begin(self, writer: StreamWriter) -> None:
        """Gather a streamed reply from its first part on."""
        self._gathered[writer.claim.ref] = _GatheredReply(writer)

    def gather(self, writer: StreamWriter, part: Part) -> None:
        """Add a part."""
        if (gathered := self._gathered.get(writer.claim.ref)) is not None:
            gathered.add(part)

    # -- outcomes

    def finish(self, claim: Claim, reply: Reply) -> None:
        """Store the reply of a request, settle its entry, and send the reply to those who wait for it."""
        gathered = self._gathered.pop(claim.ref, None)
        if self._is_closed:
            return
        if self._progress and (progress := self._progress.pop(claim.entry.id, None)) is not None:
            self._write_started()  # only a running request has progress
            self._writer.report(claim.entry.id, progress)
        is_too_long = gathered is not None and gathered.is_too_long
        if reply.error is not None and reply.error["kind"] == "RequestCancelled" and not is_too_long:
            deadline_ms = claim.entry.header.deadline_ms
            if deadline_ms and claim.running is not None and self._commands.now_ms() >= deadline_ms:
                self.expire(claim)
            else:
                self.cancel(claim)
            return
        result = Result(reply)
        if gathered is not None:
            if gathered.is_too_long:
                result = self._too_large(claim, gathered.size, gathered.limit, "max_body_bytes")
            elif reply.error is None:
                result = gathered.result(reply)
        if len(result.reply.body) > self._max_bytes:
            result = self._too_large(claim, len(result.reply.body), self._max_bytes, "max_result_bytes")
        self._store(claim, result)

    def drop(self, claim: Claim) -> None:
        """Settle a request that is not started, as it was cancelled or would miss its deadline."""
        if claim.entry.header.deadline_ms:
            self.expire(claim)
        else:
            self.cancel(claim)

    def cancel(self, claim: Claim) -> None:
        """Settle a request that was cancelled."""
        is_sized, start = claim.entry.size_bytes > 0, self._started.pop(claim, None)
        self._finish(claim, Outcome(claim.entry.id, claim.ref, CANCELLED, is_sized=is_sized, start=start))

    def expire(self, claim: Claim) -> None:
        """Settle a request whose deadline passed. If it was never started, its idempotency key is free again."""
        waited_ms = claim.entry.header.deadline_ms - int(id_of(claim.ref).partition(b"-")[0])
        error = RequestTimeout(f"backend {self._backend!r}", round(max(0, waited_ms) / 1000, 3))
        self._store(claim, Result(self._failed(claim, error)), frees_key=not claim.entry.attempts)

    def refuse(self, claim: Claim, error: PenstockError) -> None:
        """Store an error for a request that does not run. It is not settled."""
        self._store(claim, Result(self._failed(claim, error)), settles=False)

    def _store(self, claim: Claim, result: Result, *, settles: bool = True, frees_key: bool = False) -> None:
        self._finish(claim, self._outcome(claim, result, settles, frees_key), result)

    def _outcome(self, claim: Claim, result: Result, settles: bool, frees_key: bool) -> Outcome:
        reply = result.reply
        is_large = len(reply.body) > LARGE
        kept = Reply("", reply.status, reply.codec, reply.headers, reply.error, reply.replica, 0.0, reply.run_ms)
        kept.body, kept.large = b"" if is_large else reply.body, is_large
        error = b"" if reply.error is None else _shown_error(from_wire(reply.error))
        return Outcome(
            claim.entry.id,
            claim.ref,
            SUCCEEDED if reply.error is None else FAILED,
            Result(kept, result.pieces).dump(),
            error,
            reply.body if is_large else None,
            claim.entry.size_bytes > 0,
            settles,
            frees_key,
            self._started.pop(claim, None),
        )

    def _finish(self, claim: Claim, outcome: Outcome, result: Result | None = None) -> None:
        if self._is_closed:
            return
        entry = claim.entry
        fits = result is not None and not result.pieces and outcome.large_body is None

        def send(waiters: Sequence[tuple[str, str]], is_stored: bool) -> None:
            for caller, call in waiters:
                if fits and is_stored:
                    assert result is not None
                    of = result.reply
                    reply = Reply(call, of.status, of.codec, of.headers, of.error, of.replica, 0.0, of.run_ms, of.body)
                else:
                    reply = Reply(call, codec=IN_REDIS, replica=self._replica)
                self._send(caller, reply)

        def too_long() -> Outcome:
            assert outcome.large_body is not None
            size = len(outcome.large_body)
            small = self._too_large(
                claim, size, min(self._commands.max_string_bytes, size - 1), "proto-max-bulk-len of Redis"
            )
            return replace(self._outcome(claim, small, outcome.settles, outcome.frees_key), start=outcome.start)

        if outcome.large_body is not None and len(outcome.large_body) > self._commands.max_string_bytes:
            outcome = too_long()
        self._writer.finish(outcome, self._ttl_ms, send, too_long)
        if entry.large:
            self._commands.post(
                _log_failure, "UNLINK", self._keys.body(self._backend, entry.id), repeat=True, patient=True
            )

    def _send(self, caller: str, reply: Reply) -> None:
        if not is_combined(reply):
            self._replies.send(caller, reply.fields())
            return
        if not self._alike:
            self._commands.join_write(self._send_alike)
        self._alike.setdefault((caller, reply.codec, reply.status), []).append(reply)

    def _send_alike(self) -> None:
        alike, self._alike = self._alike, {}
        send_combined(self._replies, alike)

    def _too_large(self, claim: Claim, size: int, limit: int, limited_by: str) -> Result:
        said = str(PayloadTooLarge(size, limit, limited_by))
        return Result(self._failed(claim, BackendError(PayloadTooLarge.__name__, said)))

    def _failed(self, claim: Claim, error: PenstockError) -> Reply:
        return Reply(claim.entry.id, error.status, error=to_wire(error), replica=self._replica)


class _GatheredReply:
    """A streamed reply, as far as its parts have come."""

    def __init__(self, writer: StreamWriter) -> None:
        self.writer = writer
        self.limit = writer.claim.entry.keep_bytes or 0
        self.size = 0
        self.is_too_long = False
        self._first: Part | None = None
        self._pieces: list[Piece] = []
        self._bodies: list[bytes] = []

    def add(self, part: Part) -> None:
        if self._first is None:
            self._first = part
        self.size += len(part.body)
        if self.size > self.limit:
            self.is_too_long = True
            self._bodies.clear()
            self.writer.stop()
            return
        self._bodies.append(part.body)
        last = len(part.sizes) - 1
        for at, size in enumerate(part.sizes):
            self._pieces.append((part.codec, size, part.more and at == last))

    def result(self, end: Reply) -> Result:
        """Return the whole result; ``end`` is the reply that ends the stream."""
        body, first = b"".join(self._bodies), self._first
        # A generator without values has one part, which is empty.
        has_head = first is not None and (first.sizes or first.headers or first.status != 200)
        if first is not None and first.codec == "response" and has_head:
            whole = replace(end, status=first.status, codec="response", headers=first.headers, body=body)
            return Result(whole)
        return Result(replace(end, status=200, codec="stream", body=body), self._pieces)


def _shown_error(error: PenstockError) -> bytes:
    if isinstance(error, BackendError):
        return exact_json.dumps({"type": error.type_name, "message": error.message})
    return exact_json.dumps({"type": type(error).__name__, "message": str(error)})


def _log_failure(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("cannot delete the body of a request: %s", result)
