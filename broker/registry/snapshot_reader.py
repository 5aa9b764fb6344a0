"""Reader of snapshots: it reads the whole registry once, and from then on the records that changed.

A snapshot belongs to one version, whatever is written meanwhile, because one script reads all of it. The reader keeps
its place in the feed of changes. Where the feed does not lead from there to the present version, the whole registry is
read again: the broker has lost its data or the last changes, the feed was trimmed, the instance was erased, or the
change is too large or was written by an earlier release.
"""

from __future__ import annotations

from collections.abc import Mapping
from secrets import token_hex
from typing import Any, TypeVar

from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .json_records import parse_objects, read_record
from .records import BackendRecord, Change, EndpointRecord, FeedPlace, Snapshot

T = TypeVar("T", BackendRecord, EndpointRecord)

_MOST_NAMED = 100
"""The most records of one change that the feed names. Larger changes are followed by reading everything."""

_MOST_READ = 1000
"""The most changed records that are read one by one. Far fewer than Lua can pass to one command."""

# An entry of the feed: the version, a random mark, then the kind and the name of each record, or 'all'. By the mark, an
# entry of a feed that was created again is never mistaken for the one that the reader knows. KEYS: version, backends,
# endpoints, feed. ARGV: an entry of the feed and its mark, the reader's place; or '' and ''. Returns the version and
# the last entry with its mark; then either all backends and all endpoints, or the names of the changed backends, their
# values, and the same of the endpoints. A user without the permission for HMGET gets everything.
_READ = Script(f"""#!lua flags=no-writes
local version = redis.call('GET', KEYS[1]) or '0'
local function mark_of(fields) return fields[3] == 'change' and fields[4] or '' end
local function changed()
  if ARGV[2] == '' then return end
  local entries = redis.call('XREVRANGE', KEYS[4], '+', ARGV[1])
  local known, newest = entries[#entries], entries[1]
  if not known or known[1] ~= ARGV[1] or mark_of(known[2]) ~= ARGV[2] or newest[2][2] ~= version then return end
  local names, seen, count = {{backend = {{}}, endpoint = {{}}}}, {{}}, 0
  for n = 1, #entries - 1 do
    local fields = entries[n][2]
    if mark_of(fields) == '' then return end
    for f = 5, #fields, 2 do
      if fields[f] == 'all' then return end
      local of_kind, record = names[fields[f]], fields[f] .. fields[f + 1]
      if of_kind and not seen[record] then
        of_kind[#of_kind + 1], seen[record], count = fields[f + 1], true, count + 1
      end
    end
  end
  if count > {_MOST_READ} then return end
  local out = {{version, newest[1], mark_of(newest[2])}}
  for hash, of_kind in pairs({{[2] = names.backend, [3] = names.endpoint}}) do
    local values = #of_kind > 0 and redis.pcall('HMGET', KEYS[hash], unpack(of_kind)) or {{}}
    if values.err then return end
    out[hash * 2], out[hash * 2 + 1] = of_kind, values
  end
  return out
end
local out = changed()
if out then return out end
local last = redis.call('XREVRANGE', KEYS[4], '+', '-', 'COUNT', 1)[1] or {{'', {{}}}}
return {{version, last[1], mark_of(last[2]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}}
""")


def fields_of(change: Change) -> list[Arg]:
    """Return the fields, after the version, by which the feed describes a change to readers."""
    fields: list[Arg] = ["change", token_hex(8)]
    if len(change.backends) + len(change.endpoints) > _MOST_NAMED:
        return [*fields, "all", ""]
    for tag in change.backends:
        fields += ("backend", tag)
    for name in change.endpoints:
        fields += ("endpoint", name)
    return fields


class SnapshotReader:
    """Reads snapshots of the registry over ``connection``."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection = connection
        self._keys = [keys.version, keys.backends, keys.endpoints, keys.feed]
        self._last = Snapshot()

    async def read(self) -> Snapshot:
        """Return the present snapshot: the same object as last time if nothing changed.

        Records that are as they were in the last snapshot are the same objects.

        Raises:
            WireError: a record cannot be read.
        """
        last = self._last
        place: list[Arg] = [last.place.entry, last.place.mark]
        reply: list[Any] = await self._connection.run_script(_READ, self._keys, place, repeat=True)
        version, entry, mark, *parts = reply
        if len(parts) == 2:
            backends = _all(BackendRecord, last.backends, parts[0])
            endpoints = _all(EndpointRecord, last.endpoints, parts[1])
        else:
            backends = _changed(BackendRecord, last.backends, *parts[:2])
            endpoints = _changed(EndpointRecord, last.endpoints, *parts[2:])
        fresh = Snapshot(int(version), backends, endpoints, FeedPlace(entry, mark))
        self._last = last if fresh == last and fresh.place == last.place else fresh
        return self._last


def _all(kind: type[T], before: Mapping[str, T], flat: list[bytes]) -> Mapping[str, T]:
    """Return all records of a hash, names and values in turn; those that are as ``before`` are the same objects."""
    records = {name: read_record(kind, name, raw) for name, raw in parse_objects(flat).items()}
    return {
        name: old if (old := before.get(name)) is not None and old == record else record
        for name, record in records.items()
    }


def _changed(kind: type[T], before: Mapping[str, T], names: list[bytes], values: list[bytes | None]) -> Mapping[str, T]:
    """Return the records ``before`` with those of ``names`` replaced, or deleted where the value is None."""
    if not names:
        return before
    after, written = dict(before), list[bytes]()
    for name, value in zip(names, values, strict=True):
        if value is None:
            after.pop(name.decode(), None)
        else:
            written += (name, value)
    for changed, raw in parse_objects(written).items():
        after[changed] = read_record(kind, changed, raw)
    return after
