"""Admission of kept requests: one script reserves the idempotency key, admits the request and appends its entry.

So a key is accepted once at any number of callers, and a request that is refused leaves its key free. The script may be
sent again: it finds the record of the request that it accepted before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from ..queue.publisher import QueueFull, refusal, retry_after_s
from ..queue.queued_bytes import OLDEST, RECOUNT, SET_ASIDE, SMALL
from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire._fields import (
    BODY_FIELD,
    CALLER_FIELD,
    HEADER_FIELD,
    ID_FIELD,
    KEEP_FIELD,
    LARGE_FIELD,
    SIZE_FIELD,
    VERSION,
    VERSION_FIELD,
)
from ..wire.kept import CANCELLED, FAILED, PENDING_S, QUEUED, SUCCEEDED
from ..wire.keys import Keys
from ..wire.requests import RawEntry
from .space import NOW, RECORD_BYTES, SWEEP

WAITER = "w:"
"""The beginning of the fields of a record that name its waiters: a caller, a space, and the id of the waiter's call."""

IS_FINAL = f"local is_final = {{{SUCCEEDED} = true, {FAILED} = true, {CANCELLED} = true}}"
"""Lua: the states in which a kept request stays."""

_ACCEPTED, _ATTACHED, _CONFLICT, _QUEUE_FULL, _SPACE_FULL = b"accepted", b"attached", b"conflict", b"queue", b"space"

# Accepts a kept request, or attaches a waiter to the one that holds its key. KEYS: the stream, the interactive stream,
# the batch stream, the records of sizes, the request's record, the space, the idempotency key (or the record again).
# ARGV: the limit of requests, the limit of bytes, the request's id, its header, the name and the value of its body
# field (of a large body its length), the most bytes of a streamed result, the limit of the space, milliseconds until
# the record expires, the fingerprint and the digest of the key (empty without one), the endpoint, the X-Request-Id, the
# waiter (or empty), the beginning of the keys of records. Returns the decision, then the id and state of the request,
# or the numbers of the refusal.
_ACCEPT = Script(f"""#!lua
{IS_FINAL}
local function watch(record, state)
  if ARGV[14] ~= '' and not is_final[state] then redis.call('HSET', record, '{WAITER}' .. ARGV[14], '') end
end
local state = redis.call('HGET', KEYS[5], 'status')
if state then
  watch(KEYS[5], state)
  return {{'{_ACCEPTED.decode()}', ARGV[3], state}}
end
if ARGV[10] ~= '' then
  local held = redis.call('GET', KEYS[7])
  local record = held and redis.call('HMGET', ARGV[15] .. held, 'status', 'fingerprint')
  if record and record[1] then
    if record[2] ~= ARGV[10] then return {{'{_CONFLICT.decode()}'}} end
    watch(ARGV[15] .. held, record[1])
    return {{'{_ATTACHED.decode()}', held, record[1]}}
  end
end
local depth = redis.call('XLEN', KEYS[2]) + redis.call('XLEN', KEYS[3])
local limit, limit_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local total = tonumber(redis.call('HGET', KEYS[4], 'total') or 0)
local name, value, reserved = ARGV[5], ARGV[6], false
local bytes = #ARGV[4] + #value
if name == '{LARGE_FIELD.decode()}' then
  bytes, value = #ARGV[4] + value, '1'
  local reservation = 'r:' .. redis.sha1hex(ARGV[3])
  local held = redis.call('HGET', KEYS[4], reservation)
  if held then
    redis.call('HDEL', KEYS[4], reservation)
    total = redis.call('HINCRBY', KEYS[4], 'total', -string.match(held, '^%d+'))
    reserved = true
  end
end
bytes = math.max(bytes, {SMALL})
if depth >= limit then
  {OLDEST}
  return {{'{_QUEUE_FULL.decode()}', depth, oldest_ms(KEYS[2], KEYS[3])}}
end
local used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total
if not reserved and used + bytes > limit_bytes then
  {RECOUNT}
  total = recount(KEYS[4], KEYS[2], KEYS[3]) or total
  used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total
  if used + bytes > limit_bytes then
    {OLDEST}
    return {{'{_QUEUE_FULL.decode()}', -1 - used, oldest_ms(KEYS[2], KEYS[3])}}
  end
end
{NOW}
if (redis.call('HGET', KEYS[6], 'total') or 0) + {RECORD_BYTES} > tonumber(ARGV[8]) then
  {SWEEP}
  sweep(KEYS[6], now)
  local taken = tonumber(redis.call('HGET', KEYS[6], 'total') or 0)
  if taken + {RECORD_BYTES} > tonumber(ARGV[8]) then return {{'{_SPACE_FULL.decode()}', taken}} end
end
local fields = {{'{VERSION_FIELD.decode()}', '{VERSION.decode()}', '{ID_FIELD.decode()}', ARGV[3],
  '{CALLER_FIELD.decode()}', '', '{HEADER_FIELD.decode()}', ARGV[4], name, value, '{KEEP_FIELD.decode()}', ARGV[7]}}
if bytes > {SMALL} then
  fields[#fields + 1] = '{SIZE_FIELD.decode()}'
  fields[#fields + 1] = bytes
end
local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
if bytes > {SMALL} then
  redis.call('HSET', KEYS[4], entry, bytes - {SMALL})
  redis.call('HINCRBY', KEYS[4], 'total', bytes - {SMALL})
end
local waiter = ARGV[14] ~= '' and '{WAITER}' .. ARGV[14] or 'unwatched'
redis.call('HSET', KEYS[5], 'status', '{QUEUED}', 'endpoint', ARGV[12], 'request_id', ARGV[13], 'created', now,
  'entry', entry, 'fingerprint', ARGV[10], 'key', ARGV[11], waiter, '')
redis.call('PEXPIRE', KEYS[5], ARGV[9])
if ARGV[10] ~= '' then redis.call('SET', KEYS[7], ARGV[3], 'PX', ARGV[9]) end
return {{'{_ACCEPTED.decode()}', ARGV[3], '{QUEUED}'}}
""")

# Names the backend that holds an idempotency key, unless one is named that still exists. KEYS: the name of the backend.
# ARGV: the backend, milliseconds until that expires, a backend to replace (or empty). Returns the backend.
_CHOOSE_BACKEND = Script("""#!lua
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[3] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
""")


@dataclass(frozen=True, slots=True)
class KeptEntry:
    """A request to accept, and the fields of its record."""

    raw: RawEntry
    endpoint: str
    request_id: str
    max_stream_bytes: int
    key: str = ""
    """The digest of its idempotency key; empty without one."""
    fingerprint: str = ""
    """Compared with that of other requests with the same key."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is on its stream, or another one with the same key was accepted before."""

    id: str
    """Of the request that was accepted."""
    state: str
    is_replayed: bool
    """Whether it is another one with the same key."""


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """Another request was accepted with the same key, and its fingerprint differs."""


@dataclass(frozen=True, slots=True)
class SpaceFull:
    """The records and results of the backend have reached ``max_result_bytes``."""

    used_bytes: int


Acceptance = Union[Accepted, KeyConflict, QueueFull, SpaceFull]  # noqa: UP007 - evaluated, also on Python 3.10


class KeptAdmission:
    """Accepts kept requests for one process and event loop."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys

    async def choose_backend(self, digest: str, backend: str, ttl_ms: int, *, gone: str = "") -> str:
        """Return the backend that holds an idempotency key. That is ``backend`` if none holds it.

        The traffic of an endpoint may change between a request and its repetition. So the key names its backend in a
        place that does not depend on the traffic.

        Args:
            digest: of the key.
            backend: by the endpoint's traffic.
            ttl_ms: expiry of the choice, in milliseconds.
            gone: a backend that was deleted; if it holds the key, ``backend`` takes its place.
        """
        chosen: bytes = await self._connection.run_script(
            _CHOOSE_BACKEND, [self._keys.key_backend(digest)], [backend, ttl_ms, gone], repeat=True, prompt=True
        )
        return chosen.decode()

    def prolong_choice(self, digest: str) -> None:
        """Keep the choice of `choose_backend` until the request has a result."""
        key = self._keys.key_backend(digest)
        self._connection.post(_ignore_result, "PEXPIRE", key, PENDING_S * 1000, repeat=True)

    async def accept(
        self, backend: str, kept: KeptEntry, waiter: bytes, limit: int, limit_bytes: int, limit_space: int
    ) -> Acceptance:
        """Append the entry of a kept request, if its key is free and there is room.

        Args:
            backend: tag of the backend.
            kept: the request. A large body must be stored already.
            waiter: the caller and the id of its call, to which the result is sent; empty if no caller waits.
            limit: refuse it if the backend has this many unsettled entries.
            limit_bytes: refuse it if it and the unsettled entries would take more bytes than this.
            limit_space: refuse it if the kept requests of the backend take this many bytes.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or refuses writes.
            BrokerRefused: the broker answered with an error.
        """
        keys, raw = self._keys, kept.raw
        requests, batches = keys.requests(backend), keys.batch(backend)
        id_ = raw.id.decode()
        record = keys.kept(backend, id_)
        key = keys.idempotency_key(backend, kept.key) if kept.key else record
        field: tuple[Arg, Arg] = (LARGE_FIELD, raw.large_bytes) if raw.body is None else (BODY_FIELD, raw.body)
        reply = await self._connection.run_script(
            _ACCEPT,
            [requests, requests, batches, keys.sizes(backend), record, keys.results_space(backend), key],
            [
                *(limit, limit_bytes, raw.id, raw.header, *field, kept.max_stream_bytes, limit_space),
                *(PENDING_S * 1000, kept.fingerprint, kept.key, kept.endpoint, kept.request_id, waiter),
                keys.kept(backend, ""),
            ],
            repeat=True,
            prompt=True,
        )
        return _read(reply)


def _read(reply: list[Any]) -> Acceptance:
    decision = reply[0]
    if decision == _QUEUE_FULL:
        return refusal(reply[1], retry_after_s(reply[2]))
    if decision == _SPACE_FULL:
        return SpaceFull(reply[1])
    if decision == _CONFLICT:
        return KeyConflict()
    return Accepted(reply[1].decode(), reply[2].decode(), is_replayed=decision == _ATTACHED)


_ignore_result: Callable[[Any], None] = lambda reply: None  # noqa: E731 - the choice expires later, and not at once
