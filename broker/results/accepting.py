"""Admission of kept requests: one script reserves the idempotency key, admits the request and appends its entry.

So a key is accepted once at any number of callers, and a request that is refused leaves its key free. The script may be
sent again: it finds the record of the request that it accepted before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

from ..queue.publisher import QueueFull, refusal, retry_after_s
from ..queue.queued_bytes import OLDEST, RECOUNT, SET_ASIDE, SMALL
from ..transport.commands import COPIED_BYTES, Arg, Script
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
from .counts import ADD_MOVED
from .space import NOW, RECORD_BYTES, SWEEP

IS_FINAL = f"local is_final = {{{SUCCEEDED} = true, {FAILED} = true, {CANCELLED} = true}}"
"""Lua: the states in which a kept request stays."""

_ACCEPTED, _ATTACHED, _CONFLICT, _QUEUE_FULL, _SPACE_FULL = b"accepted", b"attached", b"conflict", b"queue", b"space"

# Lua: adds a waiter to a record that has the ``waiters``.
WATCH = """
local function watch(record, waiters, waiter)
  redis.call('HSET', record, 'waiters', waiters and waiters ~= '' and waiters .. '\\n' .. waiter or waiter)
end
"""

_PER_ENTRY = 10
"""The arguments of `_ACCEPT` for each request."""

# Accepts kept requests, or attaches their waiters to the requests that hold their keys. KEYS: the interactive stream,
# the batch stream, the records of sizes, the space, the counts; then for each request its record and its idempotency
# key (or the record again). ARGV: the limit of requests, the limit of bytes, the limit of the space, milliseconds until
# a record expires, the beginning of the keys of records; then for each request its id, its header, the name and the
# value of its body field (of a large body its length), the most bytes of a streamed result, the fingerprint and the
# digest of the key (empty without one), the endpoint, the X-Request-Id, the waiter (or empty). Returns for each what
# happened, then the id and state of the request, or the numbers of the refusal.
_ACCEPT = Script(f"""#!lua
{NOW}
{WATCH}
{IS_FINAL}
local limit, limit_bytes, limit_space = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local depth = redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2])
local total = tonumber(redis.call('HGET', KEYS[3], 'total') or 0)
local taken = tonumber(redis.call('HGET', KEYS[4], 'total') or 0)
local counts, moved = KEYS[5], {{}}

local function accept(record, key, id, header, name, value, keep, fingerprint, digest, endpoint, request_id, waiter)
  local holder = id
  if digest ~= '' then holder = redis.call('GET', key) end
  if holder then
    local at = holder == id and record or ARGV[5] .. holder
    local held = redis.call('HMGET', at, 'status', 'fingerprint', 'waiters')
    if held[1] then
      if holder ~= id and held[2] ~= fingerprint then return {{'{_CONFLICT.decode()}'}} end
      local is_listed = waiter == '' or is_final[held[1]] or held[3] and string.find(held[3], waiter, 1, true)
      if not is_listed then watch(at, held[3], waiter) end
      return {{holder == id and '{_ACCEPTED.decode()}' or '{_ATTACHED.decode()}', holder, held[1]}}
    end
  end
  local bytes, reserved = #header + #value, false
  if name == '{LARGE_FIELD.decode()}' then
    bytes, value = #header + value, '1'
    local reservation = 'r:' .. redis.sha1hex(id)
    local set_aside = redis.call('HGET', KEYS[3], reservation)
    if set_aside then
      redis.call('HDEL', KEYS[3], reservation)
      total = redis.call('HINCRBY', KEYS[3], 'total', -string.match(set_aside, '^%d+'))
      reserved = true
    end
  end
  bytes = math.max(bytes, {SMALL})
  if depth >= limit then
    {OLDEST}
    return {{'{_QUEUE_FULL.decode()}', depth, oldest_ms(KEYS[1], KEYS[2])}}
  end
  local used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total
  if not reserved and used + bytes > limit_bytes then
    {RECOUNT}
    total = recount(KEYS[3], KEYS[1], KEYS[2]) or total
    used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total
    if used + bytes > limit_bytes then
      {OLDEST}
      return {{'{_QUEUE_FULL.decode()}', -1 - used, oldest_ms(KEYS[1], KEYS[2])}}
    end
  end
  if taken + {RECORD_BYTES} > limit_space then
    {SWEEP}
    sweep(KEYS[4], now)
    taken = tonumber(redis.call('HGET', KEYS[4], 'total') or 0)
    if taken + {RECORD_BYTES} > limit_space then return {{'{_SPACE_FULL.decode()}', taken}} end
  end
  local fields = {{'{VERSION_FIELD.decode()}', '{VERSION.decode()}', '{ID_FIELD.decode()}', id,
    '{CALLER_FIELD.decode()}', '', '{HEADER_FIELD.decode()}', header, name, value, '{KEEP_FIELD.decode()}', keep}}
  if bytes > {SMALL} then
    fields[#fields + 1] = '{SIZE_FIELD.decode()}'
    fields[#fields + 1] = bytes
  end
  local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
  depth = depth + 1
  if bytes > {SMALL} then
    redis.call('HSET', KEYS[3], entry, bytes - {SMALL})
    total = redis.call('HINCRBY', KEYS[3], 'total', bytes - {SMALL})
  end
  local known = {{'status', '{QUEUED}', 'endpoint', endpoint, 'request_id', request_id, 'created', now, 'entry', entry}}
  if waiter ~= '' then
    known[#known + 1] = 'waiters'
    known[#known + 1] = waiter
  end
  if digest ~= '' then
    for _, one in ipairs({{'fingerprint', fingerprint, 'key', digest}}) do known[#known + 1] = one end
    redis.call('SET', key, id, 'PX', ARGV[4])
  end
  redis.call('HSET', record, unpack(known))
  redis.call('PEXPIRE', record, ARGV[4])
  local counted = '{QUEUED}:' .. endpoint
  moved[counted] = (moved[counted] or 0) + 1
  return {{'{_ACCEPTED.decode()}', id, '{QUEUED}'}}
end

local out = {{}}
for n = 0, (#ARGV - 5) / {_PER_ENTRY} - 1 do
  local at = 5 + {_PER_ENTRY} * n
  out[n + 1] = accept(KEYS[6 + 2 * n], KEYS[7 + 2 * n], unpack(ARGV, at + 1, at + {_PER_ENTRY}))
end
{ADD_MOVED}
return out
""")

_MOST_AT_ONCE = 64
_MOST_BYTES_AT_ONCE = 512 * 1024
"""Limits of one call of the script: a larger one would delay the broker's other clients."""

# Replaces the backend that an idempotency key names, if that was deleted. KEYS: the name of the backend. ARGV: the
# backend, milliseconds until that expires, the deleted backend. Returns the backend.
_REPLACE_BACKEND = Script("""#!lua
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
    """Accepts kept requests for one process and event loop: all of one loop tick together."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._tick: dict[_Limits, list[_Pending]] = {}

    async def choose_backend(self, digest: str, backend: str, *, gone: str = "") -> tuple[str, bool]:
        """Return the backend that holds an idempotency key, and whether the choice is new: ``backend`` if none held it.

        The traffic of an endpoint may change between a request and its repetition. So the key names its backend in a
        place that does not depend on the traffic. A new choice is kept for as long as a request may wait.

        Args:
            digest: of the key.
            backend: by the endpoint's traffic.
            gone: a backend that was deleted; if it holds the key, ``backend`` takes its place.
        """
        key, ttl_ms = self._keys.key_backend(digest), PENDING_S * 1000
        chosen: bytes | None
        if gone:
            chosen = await self._connection.run_script(
                _REPLACE_BACKEND, [key], [backend, ttl_ms, gone], repeat=True, prompt=True
            )
        else:
            chosen = await self._connection.send(
                "SET", key, backend, "NX", "GET", "PX", ttl_ms, repeat=True, prompt=True
            )
        return (backend, True) if chosen is None else (chosen.decode(), False)

    def keep_choice(self, digest: str, ttl_ms: int = PENDING_S * 1000) -> None:
        """Keep the choice of `choose_backend` for so long from now on."""
        key = self._keys.key_backend(digest)
        self._connection.post(_ignore_result, "PEXPIRE", key, ttl_ms, repeat=True)

    async def accept(
        self, backend: str, kept: KeptEntry, waiter: bytes, limit: int, limit_bytes: int, limit_space: int
    ) -> Acceptance:
        """Append the entry of a kept request at the end of this loop tick, if its key is free and there is room.

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
        future: asyncio.Future[Acceptance] = asyncio.get_running_loop().create_future()
        if not self._tick:
            self._connection.join_write(self._flush)
        limits = _Limits(backend, limit, limit_bytes, limit_space)
        self._tick.setdefault(limits, []).append(_Pending(kept, waiter, future))
        return await future

    def _flush(self) -> None:
        tick, self._tick = self._tick, {}
        for limits, pending in tick.items():
            some, size = list[_Pending](), 0
            for one in pending:
                some.append(one)
                size += len(one.kept.raw.header) + len(one.kept.raw.body or b"")
                if len(some) >= _MOST_AT_ONCE or size >= _MOST_BYTES_AT_ONCE:
                    self._accept_together(limits, some)
                    some, size = [], 0
            if some:
                self._accept_together(limits, some)

    def _accept_together(self, limits: _Limits, pending: list[_Pending]) -> None:
        keys, backend = self._keys, limits.backend
        names = [keys.requests(backend), keys.batch(backend), keys.sizes(backend), keys.results_space(backend)]
        names.append(keys.submitted(backend))
        prefix = keys.kept(backend, "")
        args: list[Arg] = [limits.requests, limits.bytes, limits.space, PENDING_S * 1000, prefix]
        is_bulky = False
        for kept, waiter, _ in pending:
            raw = kept.raw
            record = prefix + raw.id.decode()
            names += (record, keys.idempotency_key(backend, kept.key) if kept.key else record)
            args += (raw.id, raw.header)
            if raw.body is None:
                args += (LARGE_FIELD, raw.large_bytes)
            else:
                args += (BODY_FIELD, raw.body)
                is_bulky = is_bulky or len(raw.body) > COPIED_BYTES
            args += (kept.max_stream_bytes, kept.fingerprint, kept.key, kept.endpoint, kept.request_id, waiter)

        def hand_out(reply: Any) -> None:
            is_error = isinstance(reply, Exception)
            for at, one in enumerate(pending):
                if one.future.done():
                    continue  # the caller was cancelled
                if is_error:
                    one.future.set_exception(reply)
                else:
                    one.future.set_result(_read(reply[at]))

        self._connection.post_script(hand_out, _ACCEPT, names, args, repeat=True, prompt=True, bulky=is_bulky)


class _Limits(NamedTuple):
    """A backend, with the limits of its queue in requests and bytes, and of the bytes of its results."""

    backend: str
    requests: int
    bytes: int
    space: int


class _Pending(NamedTuple):
    """A request that is accepted at the end of the loop tick."""

    kept: KeptEntry
    waiter: bytes
    future: asyncio.Future[Acceptance]


def _read(reply: list[Any]) -> Acceptance:
    what = reply[0]
    if what in (_ACCEPTED, _ATTACHED):
        return Accepted(reply[1].decode(), reply[2].decode(), is_replayed=what == _ATTACHED)
    if what == _QUEUE_FULL:
        return refusal(reply[1], retry_after_s(reply[2]))
    if what == _SPACE_FULL:
        return SpaceFull(reply[1])
    return KeyConflict()


_ignore_result: Callable[[Any], None] = lambda reply: None  # noqa: E731 - the choice expires later, and not at once
