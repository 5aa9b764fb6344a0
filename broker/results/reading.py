"""Status, result and cancellation of kept requests, by their ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ..queue.queued_bytes import RELEASE
from ..queue.signals import signal
from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..wire.kept import CANCELLED, FINAL, STATUS_FIELDS, RequestStatus, Result, load_status, mark_of
from ..wire.keys import Keys
from .accepting import IS_FINAL, WATCH
from .counts import ADD_MOVED
from .space import CHARGE, NOW, RECORD_BYTES

# Returns the status of a request. KEYS: the record, the result, the request streams. ARGV: the fields. Returns their
# values, then whether the result is there and the depth of the queue.
_STATUS = Script("""#!lua flags=no-writes
local out = redis.call('HMGET', KEYS[1], unpack(ARGV))
out[#ARGV + 1] = redis.call('EXISTS', KEYS[2])
out[#ARGV + 2] = redis.call('XLEN', KEYS[3]) + redis.call('XLEN', KEYS[4])
return out
""")

# Adds a waiter to a request that has no result yet. KEYS: the record. ARGV: the waiter. Returns the state, or nothing.
_WATCH = Script(f"""#!lua flags=allow-oom
{IS_FINAL}
{WATCH}
local record = redis.call('HMGET', KEYS[1], 'status', 'waiters')
if record[1] and not is_final[record[1]] and not string.find(record[2] or '', ARGV[1], 1, true) then
  watch(KEYS[1], record[2], ARGV[1])
end
return record[1]
""")

# Removes a waiter from a record. KEYS: the record. ARGV: the waiter.
_UNWATCH = Script("""#!lua flags=allow-oom
local waiters, left = redis.call('HGET', KEYS[1], 'waiters'), {}
if not waiters then return 0 end
for waiter in string.gmatch(waiters, '[^\\n]+') do
  if waiter ~= ARGV[1] then left[#left + 1] = waiter end
end
redis.call('HSET', KEYS[1], 'waiters', table.concat(left, '\\n'))
return 0
""")

# Returns the states of requests. KEYS: their records.
_STATES = Script("""#!lua flags=no-writes
local out = {}
for i, record in ipairs(KEYS) do out[i] = redis.call('HGET', record, 'status') or '' end
return out
""")

# Cancels a request: takes its entry off its stream. KEYS: the record, the interactive stream, the batch stream (where
# the replay of a dead letter lies), the records of sizes, the space, the counts. ARGV: milliseconds until a result
# expires, the beginning of idempotency keys. Returns the state before, and the ref of the entry; or nothing.
_CANCEL = Script(f"""#!lua flags=allow-oom
{NOW}
{CHARGE}
{RELEASE}
{IS_FINAL}
local record = redis.call('HMGET', KEYS[1], 'status', 'entry', 'key', 'endpoint')
if not record[1] then return {{}} end
if is_final[record[1]] then return {{record[1], record[2]}} end
local ttl = tonumber(ARGV[1])
local on_batch, entry = string.match(record[2], '^(b?)(.*)$')
release(KEYS[4], {{record[2]}})
redis.call('XDEL', on_batch == 'b' and KEYS[3] or KEYS[2], entry)
redis.call('HSET', KEYS[1], 'status', '{CANCELLED}', 'finished', now)
redis.call('PEXPIRE', KEYS[1], 2 * ttl)
charge(KEYS[5], now, ttl, {RECORD_BYTES})
if record[3] and record[3] ~= '' then redis.call('PEXPIRE', ARGV[2] .. record[3], ttl) end
local counts, endpoint = KEYS[6], record[4] or ''
local moved = {{[record[1] .. ':' .. endpoint] = -1, ['{CANCELLED}:' .. endpoint] = 1}}
{ADD_MOVED}
return {{record[1], record[2]}}
""")

_PAGE = 1_000


class KeptReader:
    """Reads and cancels the kept requests of an instance, by their ids."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys

    async def status(self, backend: str, id_: str) -> tuple[RequestStatus | None, bool]:
        """Return the status of a request, None if there is none, and whether its result has expired."""
        keys = self._keys
        names = [keys.kept(backend, id_), keys.result(backend, id_), keys.requests(backend), keys.batch(backend)]
        *values, has_result, depth = await self._connection.run_script(_STATUS, names, STATUS_FIELDS, repeat=True)
        if values[0] is None:
            return None, False
        status = load_status(id_, values, depth)
        return status, status.is_final and status.status != CANCELLED and not has_result

    async def result(self, backend: str, id_: str) -> Result | None:
        """Return the result of a request, with its body; None if there is none."""
        raw: bytes | None = await self._connection.send("GET", self._keys.result(backend, id_), repeat=True)
        if raw is None:
            return None
        result = Result.load(raw)
        if not result.is_large:
            return result
        key = self._keys.result_body(backend, id_)
        body: bytes | None = await self._connection.send("GET", key, repeat=True, bulky_reply=True)
        if body is None:  # expired in between
            return None
        return replace(result, reply=replace(result.reply, body=body, large=False))

    async def watch(self, backend: str, id_: str, waiter: bytes) -> str | None:
        """Have the result sent to a waiter, and return the state of the request; None if there is none."""
        state: bytes | None = await self._connection.run_script(
            _WATCH, [self._keys.kept(backend, id_)], [waiter], repeat=True
        )
        return None if state is None else state.decode()

    def unwatch(self, backend: str, id_: str, waiter: bytes) -> None:
        """Take back `watch`, and a waiter that was given when the request was accepted."""
        self._connection.post_script(_ignore_result, _UNWATCH, [self._keys.kept(backend, id_)], [waiter], repeat=True)

    async def finished(self, backend: str, ids: Sequence[str]) -> list[str]:
        """Return those of the requests that have a final state, or that do not exist."""
        found: list[str] = []
        for start in range(0, len(ids), _PAGE):
            some = ids[start : start + _PAGE]
            keys = [self._keys.kept(backend, id_) for id_ in some]
            states: list[bytes] = await self._connection.run_script(_STATES, keys, [], repeat=True)
            found += [id_ for id_, state in zip(some, states, strict=True) if not state or state.decode() in FINAL]
        return found

    async def cancel(self, backend: str, id_: str, ttl_ms: int) -> str | None:
        """Cancel a request: a queued one never starts, and the replica that runs one gets a signal.

        Returns the state before; None if there is no such request.
        """
        keys = self._keys
        reply: list[Any] = await self._connection.run_script(
            _CANCEL,
            [
                keys.kept(backend, id_),
                keys.requests(backend),
                keys.batch(backend),
                keys.sizes(backend),
                keys.results_space(backend),
                keys.submitted(backend),
            ],
            [ttl_ms, keys.idempotency_key(backend, "")],
            repeat=True,
        )
        if not reply:
            return None
        state: str = reply[0].decode()
        if state not in FINAL or state == CANCELLED:
            signal(self._connection, keys, backend, reply[1])
        return state

    async def statuses(self, backend: str) -> AsyncIterator[RequestStatus]:
        """Yield the status of every kept request of a backend.

        It scans all keys of the Redis (``SCAN``), which only the owner of an instance may do.
        """
        prefix = self._keys.kept(backend, "")
        cursor: bytes | int = 0
        while True:
            cursor, found = await self._connection.send(
                "SCAN", cursor, "MATCH", prefix + "*", "COUNT", _PAGE, repeat=True
            )
            for key in found:
                id_ = key.decode()[len(prefix) :]
                if mark_of(id_) is not None:
                    status, _ = await self.status(backend, id_)
                    if status is not None:
                        yield status
            if int(cursor) == 0:
                return


def _ignore_result(reply: Any) -> None:
    """Ignore a waiter that stays on the record: its caller ignores the result."""
