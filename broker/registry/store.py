"""The registry of an instance in Redis: each change is one script, which bumps the version and appends to the feed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

import orjson

from ..errors import BrokerFull, ConfigError, PenstockError, StringTooLong, WireError
from ..queue import ownership
from ..queue.group.replica_lease import DROPPED
from ..queue.signals import RECORD_CHANGED, signal
from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire._fields import LARGEST
from ..wire.keys import Keys
from .json_records import parse_objects, read_record
from .records import Change, Snapshot
from .reports import JobReport, Report, ReportT
from .snapshot_reader import SnapshotReader, fields_of

log = logging.getLogger(__name__)

_DROPPED_MS = 60_000
"""Expiry of the mark of a dead replica. Its lease would have expired long before."""

_FEED_ENTRIES = 1000
"""About how many changes the feed holds. A reader that has missed more reads the whole registry."""

# KEYS: version, backends, endpoints, feed. ARGV: the version that the change was decided on, the number of fields that
# describe it in the feed and these fields, then for each record the index of its hash among KEYS, its name, and its
# JSON or '' to delete. Returns the new version, or 0 if another change came first.
_CHANGE = Script(f"""#!lua flags=allow-oom
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then return 0 end
local fields = tonumber(ARGV[2])
for i = 3 + fields, #ARGV, 3 do
  local hash = KEYS[tonumber(ARGV[i])]
  if ARGV[i + 2] == '' then
    redis.call('HDEL', hash, ARGV[i + 1])
  else
    redis.call('HSET', hash, ARGV[i + 1], ARGV[i + 2])
  end
end
local version = redis.call('INCR', KEYS[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', {_FEED_ENTRIES}, '*', 'version', version, unpack(ARGV, 3, 2 + fields))
return version
""")

# Deletes all records, and appends to the feed so that watchers notice. KEYS: as above.
_CLEAR = Script("""#!lua flags=allow-oom
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('XADD', KEYS[4], '*', 'version', redis.call('INCR', KEYS[1]))
""")

# Appends a change of no record to the feed. KEYS: version, feed. ARGV: the fields that describe it.
_WAKE = Script(f"""#!lua flags=allow-oom
local version = redis.call('INCR', KEYS[1])
return redis.call('XADD', KEYS[2], 'MAXLEN', '~', {_FEED_ENTRIES}, '*', 'version', version, unpack(ARGV))
""")

_PUT_SETTINGS = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1])
""")

_REPORT = Script("""#!lua flags=allow-oom
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
""")


class Registry:
    """Reads and changes the registry of one instance."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._reader = SnapshotReader(connection, keys)

    async def snapshot(self) -> Snapshot:
        """Return the present snapshot: the same object as last time if nothing changed.

        Raises:
            WireError: a record cannot be read.
        """
        return await self._reader.read()

    async def change(self, decide: Callable[[Snapshot], Change]) -> int:
        """Write the change that ``decide`` returns for the current snapshot; return the version that includes it.

        ``decide`` must be pure: it runs again whenever another change was written first (optimistic locking). An
        exception that it raises propagates, and nothing is written. An empty change writes nothing and returns the
        current version.

        Raises:
            BrokerUnavailable: if the connection broke during the write, the change may have been made.
        """
        keys = self._keys
        while True:
            seen = await self.snapshot()
            change = decide(seen)
            if not change.backends and not change.endpoints:
                return seen.version
            fields = fields_of(change)
            args: list[Arg] = [seen.version, len(fields), *fields]
            for tag, backend in change.backends.items():
                args += [2, tag, b"" if backend is None else orjson.dumps(asdict(backend))]
            for name, endpoint in change.endpoints.items():
                args += [3, name, b"" if endpoint is None else orjson.dumps(asdict(endpoint))]
            version = await self._connection.run_script(
                _CHANGE, [keys.version, keys.backends, keys.endpoints, keys.feed], args
            )
            if version:
                for tag, backend in change.backends.items():
                    if backend is not None and tag in seen.backends:
                        signal(self._connection, keys, tag, RECORD_CHANGED)
                return int(version)

    async def get_tags(self) -> list[str]:
        """Return the tags of all backends."""
        return [tag.decode() for tag in await self._connection.send("HKEYS", self._keys.backends, repeat=True)]

    async def put_code(self, blob: bytes) -> str:
        """Store a backend's code, or the files that come with it, and return its digest (SHA-256).

        Raises:
            ConfigError: ``blob`` is larger than the ``proto-max-bulk-len`` of Redis.
            PenstockError: the broker is out of memory.
        """
        if len(blob) > (limit := min(LARGEST, self._connection.max_string_bytes)):
            raise _too_large(blob, str(limit) if limit == LARGEST else f"{limit} or less")
        digest = hashlib.sha256(blob).hexdigest()
        try:
            await self._connection.send("SET", self._keys.code(digest), blob, repeat=True, bulky=True)
        except StringTooLong:
            raise _too_large(blob, f"{len(blob) - 1} or less") from None
        except BrokerFull:
            raise PenstockError(f"the broker has no memory left for {len(blob)} bytes of code") from None
        return digest

    async def get_code(self, digest: str) -> bytes:
        """Return the bytes that `put_code` stored.

        Raises:
            PenstockError: the registry has nothing of that digest.
            WireError: the stored bytes do not match the digest.
        """
        blob = cast("bytes | None", await self._connection.send("GET", self._keys.code(digest), repeat=True))
        if blob is None:
            raise PenstockError(f"the registry has no code {digest[:12]}…")
        if hashlib.sha256(blob).hexdigest() != digest:
            raise WireError(f"the registry's code {digest[:12]}… does not match its digest")
        return blob

    async def delete_code(self, digest: str) -> None:
        await self._connection.send("UNLINK", self._keys.code(digest), repeat=True)

    async def put_report(self, name: str, report: Report) -> None:
        """Store the latest report of a process or backend in place of its former one."""
        fields = {field: value for field, value in asdict(report).items() if value is not None}
        key = self._keys.reports(report.kind)
        await self._connection.run_script(_REPORT, [key], [name, orjson.dumps(fields)], repeat=True)

    async def get_reports(self, kind: type[ReportT]) -> dict[str, ReportT]:
        """Return the latest reports of one kind, by name. Their processes may have died since.

        Raises:
            WireError: a report cannot be read.
        """
        flat = await self._connection.send("HGETALL", self._keys.reports(kind.kind), repeat=True)
        return {name: read_record(kind, name, raw) for name, raw in parse_objects(flat).items()}

    async def delete_report(self, kind: type[Report], name: str | bytes) -> None:
        await self._connection.send("HDEL", self._keys.reports(kind.kind), name, repeat=True)

    async def get_jobs(self) -> dict[str, JobReport]:
        """Return the latest reports of jobs whose results have not expired, by name.

        Callers write them, and any caller may write anything: those that cannot be read are left out.
        """
        found = await self._all_jobs()
        return {name.decode(): report for name, report in found.items() if report is not None}

    async def forget_jobs(self) -> None:
        """Delete the reports of jobs whose results have expired, and those that cannot be read."""
        for name, report in (await self._all_jobs()).items():
            if report is None:
                await self.delete_report(JobReport, name)

    async def _all_jobs(self) -> dict[bytes, JobReport | None]:
        """Return the reports of jobs by name; None for one that has expired, or cannot be read."""
        now_ms = self._connection.now_ms()
        flat: list[bytes] = await self._connection.send("HGETALL", self._keys.reports(JobReport.kind), repeat=True)
        return {name: _read_job(name, raw, now_ms) for name, raw in zip(flat[::2], flat[1::2], strict=True)}

    async def get_settings(self) -> dict[str, Any] | None:
        """Return the settings that the instance was started with, or None if there is no such instance."""
        raw = cast("bytes | None", await self._connection.send("GET", self._keys.settings, repeat=True))
        return None if raw is None else cast("dict[str, Any]", orjson.loads(raw))

    async def put_settings(self, settings: Mapping[str, Any]) -> None:
        await self._connection.run_script(_PUT_SETTINGS, [self._keys.settings], [orjson.dumps(settings)], repeat=True)

    async def wake_watchers(self) -> None:
        """Make watchers, of which the controller has one, read now what is not in the feed, such as the settings."""
        nothing = fields_of(Change())
        await self._connection.run_script(_WAKE, [self._keys.version, self._keys.feed], nothing, repeat=True)

    async def own(self, owner: str, ttl_s: float) -> bool:
        """Acquire or renew the ownership of the instance for ``ttl_s`` seconds; False if another owner holds it."""
        return await ownership.acquire_ownership(self._connection, self._keys.owner, owner, ttl_s)

    async def disown(self, owner: str) -> None:
        await ownership.release_ownership(self._connection, self._keys.owner, owner)

    async def drop_lease(self, backend: str, replica: str) -> None:
        """Mark a replica as dead, so that its entries are redelivered at once and not when its lease expires."""
        await self._connection.send("SET", self._keys.alive(backend, replica), DROPPED, "PX", _DROPPED_MS, repeat=True)

    async def erase(self) -> None:
        """Delete every key of the instance. Watchers see an empty registry first."""
        keys = [self._keys.version, self._keys.backends, self._keys.endpoints, self._keys.feed]
        await self._connection.run_script(_CLEAR, keys, [], repeat=True)
        cursor: bytes | int = 0
        while True:
            cursor, found = await self._connection.send(
                "SCAN", cursor, "MATCH", self._keys.pattern, "COUNT", 1000, repeat=True
            )
            # One by one: the keys of several backends are in several slots of a cluster.
            await asyncio.gather(*[self._connection.send("UNLINK", key, repeat=True) for key in found])
            if int(cursor) == 0:
                return


def _read_job(name: bytes, raw: bytes, now_ms: float) -> JobReport | None:
    try:
        ((shown, members),) = parse_objects([name, raw]).items()
        report = read_record(JobReport, shown, members)
    except (WireError, UnicodeDecodeError):
        return None
    return None if report.has_expired(now_ms) else report


def _too_large(blob: bytes, limit: str) -> ConfigError:
    return ConfigError(
        f"{len(blob)} bytes of code and arguments are more than Redis takes (its proto-max-bulk-len is {limit}): "
        "let replicas read what is large, such as a model, from a file"
    )
