"""Results of kept requests, as replicas write them.

One script stores the result, settles the entry and returns the waiters, so that no death can separate these. A request
that has a result keeps it: the result of a second run is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import BrokerFull, StringTooLong
from ..queue.group.member import GROUP
from ..queue.queued_bytes import RELEASE
from ..transport.commands import COPIED_BYTES, Arg, Script
from ..transport.connection import RedisConnection
from ..wire.entry_ref import id_of, is_batch
from ..wire.kept import PENDING_S, QUEUED, RUNNING
from ..wire.keys import Keys
from .accepting import IS_FINAL
from .counts import ADD_MOVED
from .space import CHARGE, NOW, RECORD_BYTES, SWEEP_ONCE

log = logging.getLogger(__name__)

# Lua: adds to ``fields`` the changes of a request's record when a replica starts it, in the form of `HSET`. ``started``
# is the time by the clock of the replica, which may be a little off.
STARTED = """
local function add_started(fields, now, created, old_deliveries, old_attempts, started, deliveries, attempts)
  local n = #fields
  fields[n + 1], fields[n + 2] = 'started', math.max(tonumber(created) or 0, math.min(now, tonumber(started)))
  fields[n + 3], fields[n + 4] = 'deliveries', (tonumber(old_deliveries) or 0) + deliveries
  fields[n + 5], fields[n + 6] = 'attempts', (tonumber(old_attempts) or 0) + attempts
end
"""

# Marks requests as running. KEYS: the counts, and the records of the requests. ARGV: the replica, milliseconds until a
# record expires; then for each request the time of its last start, and how many deliveries and attempts have begun
# since the last call.
_START = Script(f"""#!lua flags=allow-oom
{NOW}
{STARTED}
local counts, moved = KEYS[1], {{}}
for i = 1, #KEYS - 1 do
  local record = KEYS[i + 1]
  local held = redis.call('HMGET', record, 'status', 'created', 'deliveries', 'attempts', 'progress', 'endpoint')
  if held[1] == '{QUEUED}' or held[1] == '{RUNNING}' then
    local fields = {{'status', '{RUNNING}', 'replica', ARGV[1]}}
    add_started(fields, now, held[2], held[3], held[4], ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2])
    redis.call('HSET', record, unpack(fields))
    if held[5] then redis.call('HDEL', record, 'progress') end
    redis.call('PEXPIRE', record, ARGV[2])
    if held[1] == '{QUEUED}' then
      local before, after = '{QUEUED}:' .. (held[6] or ''), '{RUNNING}:' .. (held[6] or '')
      moved[before], moved[after] = (moved[before] or 0) - 1, (moved[after] or 0) + 1
    end
  end
end
{ADD_MOVED}
return 0
""")

# Writes the progress that the code reports. KEYS: the record. ARGV: the progress.
_PROGRESS = Script(f"""#!lua flags=allow-oom
if redis.call('HGET', KEYS[1], 'status') == '{RUNNING}' then redis.call('HSET', KEYS[1], 'progress', ARGV[1]) end
return 0
""")

_PER_OUTCOME = 14
"""The arguments of `_FINISH` for each request."""

# Stores results and settles their entries. KEYS: the interactive stream, the batch stream, the records of sizes, the
# space, the counts; then for each request its record, its result and the body of that. ARGV: group, replica, the
# beginning of idempotency keys, milliseconds until a result expires; then for each request 1 for an entry of the batch
# stream, the entry's id, its ref, 1 to settle it, the state, 1 to leave the key free, the error (or empty), the bytes
# of the result, 1 for a large body, 1 for an entry with a record of its size, the time of its last start (0: it is
# written) with the deliveries and attempts that have begun since that was written, and the result (empty: none).
# Returns for each -1 if a large body is not there; else 1 if the outcome was stored (0: there was one), the digest of
# the key, and the waiters. These stay on the record: sent again, the script returns them again.
_FINISH = Script(f"""#!lua flags=allow-oom
{NOW}
{STARTED}
{IS_FINAL}
local prefix, ttl = ARGV[3], tonumber(ARGV[4])
local settled, sized, kept_bytes = {{{{}}, {{}}}}, {{}}, 0
local counts, moved = KEYS[5], {{}}

local function finish(record, result_key, body, batch, id, ref, settles, state, frees, problem, size, is_large,
                      is_sized, started, deliveries, attempts, result)
  local held = redis.call('HMGET', record, 'status', 'key', 'waiters', 'created', 'deliveries', 'attempts',
    'endpoint')
  local is_open = held[1] and not is_final[held[1]]
  if is_open and is_large == '1' and redis.call('EXISTS', body) == 0 then return -1 end
  if settles == '1' then
    local ids = settled[batch + 1]
    ids[#ids + 1] = id
    if is_sized == '1' then sized[#sized + 1] = ref end
  end
  if not is_open then return {{0, '', held[3] or ''}} end
  local fields = {{'status', state, 'finished', now, 'replica', ARGV[2]}}
  if problem ~= '' then fields[7], fields[8] = 'error', problem end
  if started ~= '0' then add_started(fields, now, held[4], held[5], held[6], started, deliveries, attempts) end
  redis.call('HSET', record, unpack(fields))
  redis.call('PEXPIRE', record, 2 * ttl)
  local before, after = held[1] .. ':' .. (held[7] or ''), state .. ':' .. (held[7] or '')
  moved[before], moved[after] = (moved[before] or 0) - 1, (moved[after] or 0) + 1
  if result ~= '' then
    redis.call('SET', result_key, result, 'PX', ttl)
    if is_large == '1' then redis.call('PEXPIRE', body, ttl) end
  end
  kept_bytes = kept_bytes + {RECORD_BYTES} + size
  if held[2] and frees == '1' then
    redis.call('DEL', prefix .. held[2])
  elseif held[2] then
    redis.call('PEXPIRE', prefix .. held[2], ttl)
  end
  return {{1, held[2] or '', held[3] or ''}}
end

local out = {{}}
for n = 0, (#ARGV - 4) / {_PER_OUTCOME} - 1 do
  local at = 4 + {_PER_OUTCOME} * n
  out[n + 1] = finish(KEYS[6 + 3 * n], KEYS[7 + 3 * n], KEYS[8 + 3 * n], unpack(ARGV, at + 1, at + {_PER_OUTCOME}))
end
{ADD_MOVED}
for s, ids in ipairs(settled) do
  if #ids > 0 then
    redis.call('XACK', KEYS[s], ARGV[1], unpack(ids))
    redis.call('XDEL', KEYS[s], unpack(ids))
  end
end
if #sized > 0 then
  {RELEASE}
  release(KEYS[3], sized)
end
if kept_bytes > 0 then
  {CHARGE}
  charge(KEYS[4], now, ttl, kept_bytes)
end
return out
""")

_MOST_AT_ONCE = 64
_MOST_BYTES_AT_ONCE = 512 * 1024
"""Limits of one call of the script: a larger one would delay the broker's other clients."""

# Sets a key. KEYS: the key. ARGV: its value, milliseconds until it expires.
_PUT = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
""")


@dataclass(slots=True)
class Start:
    """The starts of a kept request that its record does not show yet."""

    started_ms: int
    """The time of the last one: Unix time by the broker's clock."""
    deliveries: int
    """How many deliveries have begun with them."""
    attempts: int = 1
    """How many calls of the code have."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of storing the result of a kept request."""

    id: str
    ref: bytes
    """Of its entry."""
    state: str
    result: bytes = b""
    """As `Result.dump` returns it; empty for a cancelled request."""
    error: bytes = b""
    """The error that its status shows, as JSON."""
    large_body: bytes | None = None
    """The body of the result, if it is to lie in a key of its own."""
    is_sized: bool = False
    """Whether its entry has a record of its size."""
    settles: bool = True
    """Whether its entry is settled with it."""
    frees_key: bool = False
    """Whether its idempotency key is free again: it was refused before it ran."""
    start: Start | None = None
    """Its last start, if that is not written yet."""


OnFinished = Callable[[Sequence[tuple[str, str]], bool], None]
"""Called with the waiters, the ids of each caller and of its call, and with whether the outcome was stored."""


class ResultWriter:
    """Writes states, progress and results of the kept requests that one replica runs."""

    def __init__(self, connection: RedisConnection, keys: Keys, backend: str, replica: str) -> None:
        self._connection, self._keys = connection, keys
        self._backend, self._replica = backend, replica
        self._shared = [keys.requests(backend), keys.batch(backend), keys.sizes(backend), keys.results_space(backend)]
        self._counts = keys.submitted(backend)
        self._shared.append(self._counts)
        self._key_prefix = keys.idempotency_key(backend, "")
        self._tick: dict[int, list[_Finishing]] = {}
        """The outcomes of this loop tick, by the expiry of their results."""

    def start(self, started: Sequence[tuple[str, Start]]) -> None:
        """Mark requests as running, by their ids."""
        keys = [self._counts, *(self._keys.kept(self._backend, id_) for id_, _ in started)]
        args: list[Arg] = [self._replica, PENDING_S * 1000]
        for _, start in started:
            args += (start.started_ms, start.deliveries, start.attempts)
        self._connection.post_script(_log_refusal, _START, keys, args, repeat=True, patient=True)

    def report(self, id_: str, progress: bytes) -> None:
        """Write the progress that the code of a running request reports, as JSON."""
        self._connection.post_script(
            _log_refusal, _PROGRESS, [self._keys.kept(self._backend, id_)], [progress], repeat=True
        )

    async def sweep(self) -> None:
        """Delete the count of results that have expired."""
        await self._connection.run_script(SWEEP_ONCE, [self._keys.results_space(self._backend)], [], repeat=True)

    def finish(
        self, outcome: Outcome, ttl_ms: int, then: OnFinished, too_long: Callable[[], Outcome] | None = None
    ) -> None:
        """Store the outcome of a request, unless it has one, and settle its entry, at the end of this loop tick.

        Args:
            outcome: with the result.
            ttl_ms: expiry of the result, in milliseconds.
            then: called with the waiters once the result is stored.
            too_long: returns another outcome, for a broker that accepts no body of this length.
        """
        body, is_early, is_stored = outcome.large_body, False, False
        key = self._keys.result_body(self._backend, outcome.id)

        def after_finish(reply: Any) -> None:
            nonlocal is_early
            if isinstance(reply, Exception):
                _log_refusal(reply)
            elif reply == -1:
                is_early = True  # the body was refused, and is sent again
                if is_stored:
                    post_finish()
            else:
                self._shorten_choice(reply[1], ttl_ms, frees=outcome.frees_key)
                then([_waiter(one) for one in reply[2].split(b"\n")] if reply[2] else (), bool(reply[0]))

        def after_body(reply: Any) -> None:
            nonlocal is_stored
            if isinstance(reply, StringTooLong):
                assert too_long is not None
                self.finish(too_long(), ttl_ms, then)
                return
            if isinstance(reply, BrokerFull):
                assert body is not None
                put: list[Arg] = [body, 2 * ttl_ms]
                self._connection.post_script(_log_refusal, _PUT, [key], put, repeat=True, patient=True, bulky=True)
                post_finish()
            elif isinstance(reply, Exception):
                _log_refusal(reply)
            else:
                is_stored = True
                if is_early:
                    post_finish()

        def post_finish() -> None:
            if not self._tick:
                self._connection.join_write(self._flush)
            self._tick.setdefault(ttl_ms, []).append(_Finishing(outcome, after_finish))

        if body is not None:
            wait = {"repeat": True, "patient": True, "needs_memory": True}
            self._connection.post(after_body, "SET", key, body, "PX", 2 * ttl_ms, bulky=True, **wait)
        post_finish()

    def _flush(self) -> None:
        tick, self._tick = self._tick, {}
        for ttl_ms, finishing in tick.items():
            some, size = list[_Finishing](), 0
            for one in finishing:
                some.append(one)
                size += len(one.outcome.result)
                if len(some) >= _MOST_AT_ONCE or size >= _MOST_BYTES_AT_ONCE:
                    self._finish_together(some, ttl_ms)
                    some, size = [], 0
            if some:
                self._finish_together(some, ttl_ms)

    def _finish_together(self, finishing: list[_Finishing], ttl_ms: int) -> None:
        keys, backend = self._keys, self._backend
        names = self._shared.copy()
        args: list[Arg] = [GROUP, self._replica, self._key_prefix, ttl_ms]
        is_bulky = False
        for outcome, _ in finishing:
            id_, ref, result, large = outcome.id, outcome.ref, outcome.result, outcome.large_body
            names += (keys.kept(backend, id_), keys.result(backend, id_), keys.result_body(backend, id_))
            start = outcome.start or _WRITTEN
            is_bulky = is_bulky or len(result) > COPIED_BYTES
            args += (
                *(int(is_batch(ref)), id_of(ref), ref, int(outcome.settles), outcome.state, int(outcome.frees_key)),
                *(outcome.error, len(result) + (0 if large is None else len(large)), int(large is not None)),
                *(int(outcome.is_sized), start.started_ms, start.deliveries, start.attempts, result),
            )

        def hand_out(reply: Any) -> None:
            is_error = isinstance(reply, Exception)
            for at, one in enumerate(finishing):
                try:
                    one.then(reply if is_error else reply[at])
                except Exception:
                    log.exception("the continuation of a kept result failed")

        self._connection.post_script(hand_out, _FINISH, names, args, repeat=True, patient=True, bulky=is_bulky)

    def _shorten_choice(self, digest: bytes, ttl_ms: int, *, frees: bool) -> None:
        if digest:
            # In another slot of a cluster than the key itself.
            choice = self._keys.key_backend(digest.decode())
            left_ms = 1_000 if frees else ttl_ms + 1_000
            self._connection.post(_log_refusal, "PEXPIRE", choice, left_ms, repeat=True, patient=True)


class _Finishing(NamedTuple):
    """An outcome that is stored at the end of the loop tick."""

    outcome: Outcome
    then: Callable[[Any], None]


_WRITTEN = Start(0, 0, 0)


def _waiter(raw: bytes) -> tuple[str, str]:
    caller, _, call = raw.decode(errors="replace").rpartition(" ")
    return caller, call


def _log_refusal(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("the broker refused the state or the result of a kept request: %s", result)
