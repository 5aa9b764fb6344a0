"""Results of kept requests, as replicas write them.

One script stores the result, settles the entry and returns the waiters, so that no death can separate these. A request
that has a result keeps it: the result of a second run is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BrokerFull, StringTooLong
from ..queue.group.member import GROUP
from ..queue.queued_bytes import RELEASE
from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire.entry_ref import id_of, is_batch
from ..wire.kept import PENDING_S, QUEUED, RUNNING
from ..wire.keys import Keys
from .accepting import IS_FINAL, WAITER
from .space import CHARGE, NOW, RECORD_BYTES, SWEEP_ONCE

log = logging.getLogger(__name__)

# Marks requests as running. KEYS: their records. ARGV: the replica, milliseconds until a record expires, and for each
# request 1 if the replica starts it anew, or 0 for another attempt of the same delivery.
_START = Script(f"""#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] .. string.sub('000000' .. time[2], -6, -4)
for i, record in ipairs(KEYS) do
  local state = redis.call('HGET', record, 'status')
  if state == '{QUEUED}' or state == '{RUNNING}' then
    redis.call('HSET', record, 'status', '{RUNNING}', 'started', now, 'replica', ARGV[1])
    redis.call('HDEL', record, 'progress')
    redis.call('HINCRBY', record, 'deliveries', ARGV[2 + i])
    redis.call('HINCRBY', record, 'attempts', 1)
    redis.call('PEXPIRE', record, ARGV[2])
  end
end
return 0
""")

# Writes the progress that the code reports. KEYS: the record. ARGV: the progress.
_PROGRESS = Script(f"""#!lua flags=allow-oom
if redis.call('HGET', KEYS[1], 'status') == '{RUNNING}' then redis.call('HSET', KEYS[1], 'progress', ARGV[1]) end
return 0
""")

# Stores a result and settles the entry. KEYS: the record, the result, the body of the result, the stream, the records
# of sizes, the space. ARGV: group, the entry's id, its ref, 1 to settle it, the state, milliseconds until the result
# expires, the beginning of idempotency keys, 1 to leave the key free, the replica, the error (or empty), the bytes of
# the result, 1 for a large body, 1 for an entry with a record of its size, then the fields of the result. Returns -1 if
# a large body is not there; else 1 if the outcome was stored (0: there was one), the digest of the key, and the
# waiters. These stay on the record: sent again, the script returns them again.
_FINISH = Script(f"""#!lua flags=allow-oom
{IS_FINAL}
local record = redis.call('HMGET', KEYS[1], 'status', 'key')
local is_open = record[1] and not is_final[record[1]]
if is_open and ARGV[12] == '1' and redis.call('EXISTS', KEYS[3]) == 0 then return -1 end
if ARGV[4] == '1' then
  redis.call('XACK', KEYS[4], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[4], ARGV[2])
  if ARGV[13] == '1' then
    {RELEASE}
    release(KEYS[5], {{ARGV[3]}})
  end
end
local ttl = tonumber(ARGV[6])
if is_open then
  {NOW}
  {CHARGE}
  redis.call('HSET', KEYS[1], 'status', ARGV[5], 'finished', now, 'replica', ARGV[9], 'error', ARGV[10])
  redis.call('PEXPIRE', KEYS[1], 2 * ttl)
  if #ARGV > 13 then
    redis.call('HSET', KEYS[2], unpack(ARGV, 14))
    redis.call('PEXPIRE', KEYS[2], ttl)
    if ARGV[12] == '1' then redis.call('PEXPIRE', KEYS[3], ttl) end
  end
  charge(KEYS[6], now, ttl, {RECORD_BYTES} + ARGV[11])
  if record[2] and record[2] ~= '' then
    if ARGV[8] == '1' then
      redis.call('DEL', ARGV[7] .. record[2])
    else
      redis.call('PEXPIRE', ARGV[7] .. record[2], ttl)
    end
  end
end
local out = {{is_open and 1 or 0, is_open and record[2] or ''}}
if record[1] then
  local fields = redis.call('HGETALL', KEYS[1])
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, {len(WAITER)}) == '{WAITER}' then
      out[#out + 1] = string.sub(fields[i], {len(WAITER) + 1})
    end
  end
end
return out
""")

# Sets a key. KEYS: the key. ARGV: its value, milliseconds until it expires.
_PUT = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
""")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of storing the result of a kept request."""

    id: str
    ref: bytes
    """Of its entry."""
    state: str
    fields: Sequence[bytes] = ()
    """Of the result; none of a cancelled request."""
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


OnFinished = Callable[[Sequence[tuple[str, str]], bool], None]
"""Called with the waiters, the ids of each caller and of its call, and with whether the outcome was stored."""


class ResultWriter:
    """Writes states, progress and results of the kept requests that one replica runs."""

    def __init__(self, connection: RedisConnection, keys: Keys, backend: str, replica: str) -> None:
        self._connection, self._keys = connection, keys
        self._backend, self._replica = backend, replica
        self._streams = [keys.requests(backend), keys.batch(backend)]
        self._key_prefix = keys.idempotency_key(backend, "")

    def start(self, started: Sequence[tuple[str, bool]]) -> None:
        """Mark requests as running: by their ids, each with whether the replica starts it anew.

        If not, it is another attempt of the same delivery.
        """
        keys = [self._keys.kept(self._backend, id_) for id_, _ in started]
        self._post(
            _log_refusal, _START, keys, [self._replica, PENDING_S * 1000, *(int(is_new) for _, is_new in started)]
        )

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
        """Store the outcome of a request, unless it has one, and settle its entry.

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
                self._prolong_choice(reply[1], ttl_ms, frees=outcome.frees_key)
                then([_waiter(one) for one in reply[2:]], bool(reply[0]))

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
            self._post(after_finish, _FINISH, self._finish_keys(outcome), self._finish_args(outcome, ttl_ms))

        if body is not None:
            wait = {"repeat": True, "patient": True, "needs_memory": True}
            self._connection.post(after_body, "SET", key, body, "PX", 2 * ttl_ms, bulky=True, **wait)
        post_finish()

    def _finish_keys(self, outcome: Outcome) -> list[str]:
        keys, backend = self._keys, self._backend
        return [
            keys.kept(backend, outcome.id),
            keys.result(backend, outcome.id),
            keys.result_body(backend, outcome.id),
            self._streams[is_batch(outcome.ref)],
            keys.sizes(backend),
            keys.results_space(backend),
        ]

    def _finish_args(self, outcome: Outcome, ttl_ms: int) -> list[Arg]:
        large = outcome.large_body
        size = sum(map(len, outcome.fields)) + (0 if large is None else len(large))
        return [
            *(GROUP, id_of(outcome.ref), outcome.ref, int(outcome.settles), outcome.state, ttl_ms),
            *(self._key_prefix, int(outcome.frees_key), self._replica, outcome.error, size, int(large is not None)),
            int(outcome.is_sized),
            *outcome.fields,
        ]

    def _prolong_choice(self, digest: bytes, ttl_ms: int, *, frees: bool) -> None:
        if digest and not frees:
            # In another slot of a cluster than the key itself.
            choice = self._keys.key_backend(digest.decode())
            self._connection.post(_log_refusal, "PEXPIRE", choice, ttl_ms + 1_000, repeat=True, patient=True)

    def _post(self, then: Callable[[Any], None], script: Script, keys: list[str], args: Sequence[Arg]) -> None:
        self._connection.post_script(then, script, keys, args, repeat=True, patient=True)


def _waiter(raw: bytes) -> tuple[str, str]:
    caller, _, call = raw.decode(errors="replace").rpartition(" ")
    return caller, call


def _log_refusal(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("the broker refused the state or the result of a kept request: %s", result)
