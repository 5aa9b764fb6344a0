"""Batch jobs: named batches whose results outlive their producer.

The results of a job are replies to a caller that has the job's name, so replicas know nothing of jobs. When a producer
ends, the reply stream is neither deleted nor trimmed: until it expires, the next producer reads it from the beginning.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import orjson

from ..errors import BrokerRefused, BrokerUnavailable, ConfigError, WireError
from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from . import ownership
from .reply_stream import ReplyStream

log = logging.getLogger(__name__)

_LEASE_S = 3.0
"""Seconds after which a job whose producer died has no owner any more."""
_RENEW_S = 0.5
_POLL_S = 0.05
_SECRET_BYTES = 32
_RENEW_EXPIRY_EVERY = 10
"""The expiry of a job's record and input is renewed with every tenth renewal of its lease."""

SECRET = "secret"
"""The member of a job's record from which the ids of its items are derived; see ``broker/wire/call_ids.py``."""

# Creates a job's record, or renews its expiry. KEYS: the record. ARGV: its value if it is new, milliseconds until it
# expires. Returns its value.
_RECORD = Script("""#!lua flags=allow-oom
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return redis.call('GET', KEYS[1])
""")


class BatchJob:
    """A named job, for the one producer that works on it, from `acquire` to `release`.

    Args:
        connection: to the broker.
        keys: the keys of the instance.
        name: of the job.
        caller: id of the caller that the job's results are replies to.
        ttl_s: seconds after which the record and the input expire when no producer works on the job.
    """

    def __init__(self, connection: RedisConnection, keys: Keys, name: str, caller: str, ttl_s: float) -> None:
        self._connection, self.name = connection, name
        self._record_key, self._owner_key = keys.job(caller), keys.job_owner(caller)
        self._input_key, self._replies_key = keys.job_input(caller), keys.replies(caller)
        self._ttl_ms = int(ttl_s * 1000)
        self._input_expires = False
        self._token = secrets.token_hex(8)
        self._keeper: asyncio.Task[None] | None = None
        self.lost = False
        """Whether another producer owns the job now, because this one did not renew its lease in time."""

    async def acquire(self) -> None:
        """Become the only producer of the job. Waits until the lease of a producer that died has expired.

        Raises:
            ConfigError: another producer works on the job.
        """
        lowest_ms: int | None = None
        while not await self._own():
            # If the time that is left rises, a live producer has renewed the lease.
            left_ms: int = await self._connection.send("PTTL", self._owner_key, repeat=True)
            if lowest_ms is not None and left_ms > lowest_ms:
                raise ConfigError(
                    f"another producer works on the job {self.name!r}: wait for its end, or choose another name"
                )
            lowest_ms = left_ms
            await asyncio.sleep(_POLL_S)
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name=f"job {self.name}")

    async def describe(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of the job. A new job gets ``record`` as its record.

        Its member ``secret`` is added: 64 hexadecimal digits that only the producers of the job can read.
        """
        written = {**record, SECRET: secrets.token_hex(_SECRET_BYTES)}
        raw = await self._connection.run_script(
            _RECORD, [self._record_key], [orjson.dumps(written), self._ttl_ms], repeat=True
        )
        found = orjson.loads(raw)
        if type(found) is not dict:
            raise WireError(f"the record of the job {self.name!r} must be a JSON object")
        known = cast("dict[str, Any]", found)
        if not _is_secret(known.get(SECRET)):  # an earlier release began the job
            known[SECRET] = written[SECRET]
            await self._connection.send(
                "SET", self._record_key, orjson.dumps(known), "PX", self._ttl_ms, repeat=True, patient=True
            )
        return known

    async def read_input(self) -> list[dict[bytes, bytes]]:
        """Return the fields that `note_input` has stored, in order."""
        found = await self._connection.send("XREAD", "STREAMS", self._input_key, "0", repeat=True)
        entries: list[tuple[bytes, list[bytes]]] = found[0][1] if found else []
        return [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in entries]

    def note_input(self, then: Callable[[Any], None], fields: Mapping[str, bytes]) -> None:
        """Store ``fields`` about the job's input, before all commands that are sent after this call."""
        members = [member for field in fields.items() for member in field]
        self._connection.post(then, "XADD", self._input_key, "*", *members, repeat=True)
        if not self._input_expires:
            self._input_expires = True
            self._connection.post(then, "PEXPIRE", self._input_key, self._ttl_ms, repeat=True)

    async def forget(self) -> None:
        """Delete the job's record, input and results: the next `describe` begins a new job."""
        self._input_expires = False
        await self._connection.send("UNLINK", self._record_key, self._input_key, repeat=True)
        await self._connection.send("XTRIM", self._replies_key, "MAXLEN", 0, repeat=True)

    async def release(self) -> None:
        """Let another producer work on the job."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        try:
            if self._connection.connected:
                await ownership.release_ownership(self._connection, self._owner_key, self._token)
        except (BrokerUnavailable, BrokerRefused):
            pass  # the lease expires

    async def _own(self) -> bool:
        return await ownership.acquire_ownership(self._connection, self._owner_key, self._token, _LEASE_S)

    async def _keep(self) -> None:
        renewals = 0
        while not self.lost:
            await asyncio.sleep(_RENEW_S)
            try:
                self.lost = not await self._own()
                if renewals % _RENEW_EXPIRY_EVERY == 0:
                    await self._connection.send("PEXPIRE", self._record_key, self._ttl_ms, repeat=True)
                    await self._connection.send("PEXPIRE", self._input_key, self._ttl_ms, repeat=True)
                renewals += 1
            except (BrokerUnavailable, BrokerRefused) as e:
                log.debug("cannot renew the lease of the job %s: %s", self.name, e)


def _is_secret(value: object) -> bool:
    return type(value) is str and re.fullmatch(f"[0-9a-f]{{{2 * _SECRET_BYTES}}}", value) is not None


class BatchJobReplies(ReplyStream):
    """The results of a job: read from the first one, and kept until they expire ``ttl_s`` after their reader ended.

    Nothing is read before `resume` is called: results are recognised by the job's secret, which must be known first.
    """

    def __init__(
        self,
        commands: RedisConnection,
        keys: Keys,
        caller: str,
        on_reply: Callable[[list[bytes]], None],
        on_loss: Callable[[], Awaitable[None]],
        *,
        ttl_s: float,
    ) -> None:
        super().__init__(commands, keys, caller, on_reply, on_loss, ttl_s=ttl_s)
        self._paused, self._waiting = True, False

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self._waiting and not self._closed:
            self._waiting = False
            self._read()

    def forget(self, ref: bytes) -> None:
        """Delete the results on the stream up to the entry ``ref``, which is included."""
        self._delete_up_to(ref)

    def drop(self, ref: bytes) -> None:
        """Delete one result."""
        self._commands.post(_ignore_result, "XDEL", self._key, ref, repeat=True)

    async def close(self) -> None:
        """Stop reading. The stream stays."""
        await self._end()

    def _read(self) -> None:
        if self._paused:
            self._waiting = True
        else:
            super()._read()

    def trim(self) -> None:
        """Delete nothing: a later producer reads the results again."""


def _ignore_result(reply: Any) -> None:
    """Ignore a failed deletion: the item then has another result, and the last one counts."""
