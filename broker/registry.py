"""What should be, and what is: backends, endpoints and traffic, shared by every process of an instance.

Each change is one script: it bumps the version, writes, and appends to the change feed, or does nothing at all because
somebody else was faster. What a change may be is decided in Python from a snapshot, by a pure function that can be run
again.

Write access to the registry is code execution on the replicas, as the backends' code lies in it (pickled).

A broker that is out of memory takes all of this but new code: there must be a way to see and to mend.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

import orjson

from . import owning
from .commands import Arg, Script
from .connection import BLOCK_MS, Connection
from .errors import BrokerFull, BrokerUnavailable, ConfigError, PenstockError, StringTooLong, WireError
from .keys import Keys
from .lease import DROPPED
from .wire import LARGEST

log = logging.getLogger(__name__)

_DROPPED_MS = 60_000
"""How long it is known that a replica is dead. Its lease has expired long before."""

ReportKind = Literal["replicas", "proxies", "backends", "controllers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """One backend as it should be."""

    tag: str
    version: str
    """Of its code, arguments and actor options. Replicas of another version are replaced."""
    code: str
    """The digest of the pickled ``(target, init_args, init_kwargs)``; see `Registry.get_code`."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """All fields of ``serve.BackendConfig``. A change of them keeps the version: replicas take it over as they run."""
    config_version: int = 1
    actor_options: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime_env: dict[str, Any] | None = None
    files: str = ""
    """The digest of the local directories that ``runtime_env`` names, stored as code is; empty if there are none."""
    accepts_batch: bool = False

    @property
    def stored(self) -> frozenset[str]:
        """The digests of all that `Registry.put_code` stored for it."""
        return frozenset({self.code, self.files} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRecord:
    """One endpoint as it should be."""

    name: str
    route: str | None = None
    methods: tuple[str, ...] = ("GET",)
    traffic: dict[str, float] = field(default_factory=dict[str, float])
    """Backend tag to weight; the weights sum to 1."""
    shadows: dict[str, float] = field(default_factory=dict[str, float])
    """Backend tag to the proportion of requests that are copied to it, 0 to 1."""
    call_methods: tuple[str, ...] | None = None
    """The methods of a backend's class that may be called through it; None: every public one."""

    def allows(self, call_method: str) -> bool:
        return self.call_methods is None or call_method in self.call_methods


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole registry at one version."""

    version: int = 0
    backends: Mapping[str, BackendRecord] = field(default_factory=dict[str, BackendRecord])
    endpoints: Mapping[str, EndpointRecord] = field(default_factory=dict[str, EndpointRecord])


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written, by name; None deletes."""

    backends: Mapping[str, BackendRecord | None] = field(default_factory=dict[str, "BackendRecord | None"])
    endpoints: Mapping[str, EndpointRecord | None] = field(default_factory=dict[str, "EndpointRecord | None"])


# A reader sees all of a version or nothing of it.
_SNAPSHOT = Script("""#!lua flags=no-writes
return {redis.call('GET', KEYS[1]) or '0', redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}
""")

# KEYS: version, backends, endpoints, feed. ARGV: the version that the change was decided on, then for each record the
# index of its hash among KEYS, its name, and its JSON or '' to delete. Returns the new version; 0 if it was overtaken.
_CHANGE = Script("""#!lua flags=allow-oom
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then return 0 end
for i = 2, #ARGV, 3 do
  local hash = KEYS[tonumber(ARGV[i])]
  if ARGV[i + 2] == '' then
    redis.call('HDEL', hash, ARGV[i + 1])
  else
    redis.call('HSET', hash, ARGV[i + 1], ARGV[i + 2])
  end
end
local version = redis.call('INCR', KEYS[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', 1000, '*', 'version', version)
return version
""")

# Leaves nothing for a watcher to see, and lets it look. KEYS: as above.
_CLEAR = Script("""#!lua flags=allow-oom
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('XADD', KEYS[4], '*', 'version', redis.call('INCR', KEYS[1]))
""")

_PUT_SETTINGS = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1])
""")

_REPORT = Script("""#!lua flags=allow-oom
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
""")


class Registry:
    """Reads and changes the registry of one instance."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys

    async def snapshot(self) -> Snapshot:
        keys = self._keys
        reply = await self._connection.run_script(
            _SNAPSHOT, [keys.version, keys.backends, keys.endpoints], [], repeat=True
        )
        version, backends, endpoints = reply
        return Snapshot(
            int(version),
            {tag: _read(BackendRecord, tag, record) for tag, record in _records(backends)},
            {name: _read(EndpointRecord, name, record) for name, record in _records(endpoints)},
        )

    async def change(self, decide: Callable[[Snapshot], Change]) -> int:
        """Write what ``decide`` makes of the current state, and return the version that has it.

        ``decide`` must be pure: it runs again whenever somebody else's change came first. What it raises is raised
        here, and nothing is written. An empty change writes nothing and returns the current version.

        Raises:
            BrokerUnavailable: if the connection broke in the middle, the change may have been made.
        """
        keys = self._keys
        while True:
            seen = await self.snapshot()
            change = decide(seen)
            args: list[Arg] = [seen.version]
            for tag, backend in change.backends.items():
                args += [2, tag, b"" if backend is None else orjson.dumps(asdict(backend))]
            for name, endpoint in change.endpoints.items():
                args += [3, name, b"" if endpoint is None else orjson.dumps(asdict(endpoint))]
            if len(args) == 1:
                return seen.version
            version = await self._connection.run_script(
                _CHANGE, [keys.version, keys.backends, keys.endpoints, keys.feed], args
            )
            if version:
                return int(version)

    async def put_code(self, blob: bytes) -> str:
        """Store a backend's code, or the files that come with it, and return its digest (SHA-256).

        Raises:
            ConfigError: it is larger than Redis takes.
            PenstockError: the broker is out of memory.
        """
        if len(blob) > (limit := min(LARGEST, self._connection.longest)):
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
        """Return what `put_code` stored.

        Raises:
            PenstockError: it is gone.
            WireError: it is not what was stored.
        """
        blob = cast("bytes | None", await self._connection.send("GET", self._keys.code(digest), repeat=True))
        if blob is None:
            raise PenstockError(f"the registry has no code {digest[:12]}…")
        if hashlib.sha256(blob).hexdigest() != digest:
            raise WireError(f"the registry's code {digest[:12]}… does not match its digest")
        return blob

    async def delete_code(self, digest: str) -> None:
        await self._connection.send("UNLINK", self._keys.code(digest), repeat=True)

    async def report(self, kind: ReportKind, name: str, record: Mapping[str, Any] | None) -> None:
        """Say how ``name`` is doing; None takes it back."""
        key = self._keys.reports(kind)
        if record is None:
            await self._connection.send("HDEL", key, name, repeat=True)
        else:
            await self._connection.run_script(_REPORT, [key], [name, orjson.dumps(record)], repeat=True)

    async def reports(self, kind: ReportKind) -> dict[str, dict[str, Any]]:
        """Return what the parts of one kind last said of themselves; some of them may be dead by now."""
        return dict(_records(await self._connection.send("HGETALL", self._keys.reports(kind), repeat=True)))

    async def get_settings(self) -> dict[str, Any] | None:
        """Return how the instance was started, or None if there is no such instance."""
        raw = cast("bytes | None", await self._connection.send("GET", self._keys.settings, repeat=True))
        return None if raw is None else cast("dict[str, Any]", orjson.loads(raw))

    async def put_settings(self, settings: Mapping[str, Any]) -> None:
        await self._connection.run_script(_PUT_SETTINGS, [self._keys.settings], [orjson.dumps(settings)], repeat=True)

    async def own(self, owner: str, ttl_s: float) -> bool:
        """Take or renew the lease of the instance for ``ttl_s`` seconds; False if somebody else holds it."""
        return await owning.own(self._connection, self._keys.owner, owner, ttl_s)

    async def disown(self, owner: str) -> None:
        await owning.disown(self._connection, self._keys.owner, owner)

    async def drop_lease(self, backend: str, replica: str) -> None:
        """Let the requests of a replica that is known to be dead be taken over now, not only when its lease expires."""
        await self._connection.send("SET", self._keys.alive(backend, replica), DROPPED, "PX", _DROPPED_MS, repeat=True)

    async def erase(self) -> None:
        """Delete every key of the instance, after telling all watchers that nothing is left."""
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


class Watcher:
    """A snapshot that follows the registry, at most a moment behind it.

    It reads the change feed with a blocking read on a connection of its own, and takes a whole snapshot whenever
    something was appended, after each break of the connection, and every `BLOCK_MS` anyhow, so that it does not matter
    what it missed.
    """

    def __init__(self, url: str, registry: Registry, keys: Keys) -> None:
        self.snapshot = Snapshot()
        self._registry, self._keys = registry, keys
        self._feed = Connection(url, name="penstock-watcher")
        self._feed.on_reconnect(self.refresh)
        self._task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Take the first snapshot, and follow from there. Raises `BrokerUnavailable`, or `BrokerRefused`."""
        await self._feed.open()
        place = await self._place()
        # Whoever may not follow is to know it, rather than to see what was for ever.
        await self._feed.send("XREAD", "COUNT", 1, "STREAMS", self._keys.feed, "$", repeat=True)
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow(place), name="registry watcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._feed.close()

    def add_listener(self, listener: Callable[[Snapshot], None]) -> None:
        """Call ``listener`` with each new snapshot, in the loop."""
        self._listeners.append(listener)

    async def wait_for(self, version: int, timeout_s: float) -> Snapshot:
        """Return the snapshot once it is at ``version`` or later.

        Raises:
            PenstockError: it was not within ``timeout_s``.
        """

        async def reached() -> Snapshot:
            while self.snapshot.version < version:
                changed = self._changed
                await changed.wait()
            return self.snapshot

        try:
            return await asyncio.wait_for(reached(), timeout_s)
        except asyncio.TimeoutError:
            raise PenstockError(
                f"the registry was not seen at version {version} within {timeout_s:g} s, but at {self.snapshot.version}"
            ) from None

    async def next_change(self, timeout_s: float) -> None:
        """Return when the snapshot changes, or after ``timeout_s`` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass

    async def _place(self) -> bytes:
        last = await self._feed.send("XREVRANGE", self._keys.feed, "+", "-", "COUNT", 1, repeat=True)
        return cast(bytes, last[0][0]) if last else b"0"

    async def _follow(self, place: bytes) -> None:
        while True:
            try:
                await self._feed.send("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._keys.feed, place)
                # Whatever that said: a feed that began anew can have ids that are not after the last. The place comes
                # before the snapshot, so that nothing falls between them.
                place = await self._place()
                await self.refresh()
            except BrokerUnavailable:
                await asyncio.sleep(0.2)  # the connection comes back by itself
            except Exception:  # or nobody would follow any more
                log.exception("cannot read the registry")
                await asyncio.sleep(1.0)

    async def refresh(self) -> None:
        """Look at once, for who knows of a change before it was heard of. Raises `BrokerUnavailable`."""
        fresh = await self._registry.snapshot()
        if fresh == self.snapshot:  # not by the version alone: an instance that was erased begins again
            return
        self.snapshot = fresh
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            try:
                listener(fresh)
            except Exception:
                log.exception("a listener to the registry failed")


def _too_large(blob: bytes, limit: str) -> ConfigError:
    return ConfigError(
        f"{len(blob)} bytes of code and arguments are more than Redis takes (its proto-max-bulk-len is {limit}): "
        "let replicas read what is large, such as a model, from a file"
    )


def _records(flat: list[bytes]) -> list[tuple[str, dict[str, Any]]]:
    records: list[tuple[str, dict[str, Any]]] = []
    for name, raw in zip(flat[::2], flat[1::2], strict=True):
        try:
            record = orjson.loads(raw)
        except ValueError as e:
            raise WireError(f"the registry's {name!r} is not JSON: {e}") from None
        if type(record) is not dict:
            raise WireError(f"the registry's {name!r} must be a JSON object, not {type(record).__name__}")
        records.append((name.decode(), cast("dict[str, Any]", record)))
    return records


RecordT = TypeVar("RecordT", BackendRecord, EndpointRecord)

_TYPES: Mapping[str, tuple[type, ...]] = {
    "tag": (str,),
    "version": (str,),
    "code": (str,),
    "config": (dict,),
    "config_version": (int,),
    "actor_options": (dict,),
    "runtime_env": (dict, type(None)),
    "files": (str,),
    "accepts_batch": (bool,),
    "name": (str,),
    "route": (str, type(None)),
    "methods": (list,),
    "traffic": (dict,),
    "shadows": (dict,),
    "call_methods": (list, type(None)),
}


def _read(kind: type[RecordT], name: str, raw: Mapping[str, Any]) -> RecordT:
    """Return a record, without the fields that a later release has given it."""
    given: dict[str, Any] = {}
    for member in fields(kind):
        if member.name in raw:
            value = given[member.name] = raw[member.name]
            if type(value) not in _TYPES[member.name]:
                raise WireError(f"the registry's {name!r} has a {type(value).__name__} as its {member.name!r}")
        elif member.default is MISSING and member.default_factory is MISSING:
            raise WireError(f"the registry's {name!r} has no {member.name!r}")
    for name_of_list in ("methods", "call_methods"):
        if given.get(name_of_list) is not None:
            given[name_of_list] = tuple(given[name_of_list])
    return kind(**given)
