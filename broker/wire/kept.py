"""Format of kept requests: ids, states, results, and the digests of idempotency keys.

A kept request is one whose result stays in Redis for some time: a submitted request, or one with an idempotency key.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import orjson

from ..errors import WireError
from . import exact_json
from .replies import Reply

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
FINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
"""The states in which a kept request stays."""

IN_REDIS = "kept"
"""The codec of a reply that tells its waiter to fetch the result from Redis."""

PENDING_S = 7 * 24 * 3600
"""How long the record of a kept request stays while it is neither started nor finished."""

MAX_PROGRESS_BYTES = 4 * 1024
"""The longest progress that code may report, as JSON."""

MAX_KEY_CHARS = 255
"""The longest idempotency key."""

MAX_STREAM_BYTES = 64 * 1024 * 1024
"""The longest streamed result that is kept for a handle. A proxy keeps up to its ``max_body_bytes``."""

_RANDOM_BYTES = 20
_BLOCK = 256
"""Number of ids per system call."""
_BACKEND_DIGITS = 8
_ID = re.compile(r"[0-9a-f]{48}")
assert 2 * _RANDOM_BYTES + _BACKEND_DIGITS == 48, "an id has 160 random bits, then the mark of its backend"

_NO_CREDENTIALS = hashlib.sha256(b"").digest()

_PIECES_FIELD = b"pieces"
_LENGTH_DIGITS = 12
"""More than the length of any string of Redis has."""

Piece = tuple[str, int, bool]
"""A piece of a streamed result: the codec of its value, its bytes, and whether the value continues in the next one."""


class NewIds:
    """Unguessable ids for kept requests: 160 random bits, then the mark of the backend.

    For one loop of one process: after a fork, two processes with the same object would make the same ids.
    """

    def __init__(self) -> None:
        self._left: list[str] = []

    def next(self, backend: str) -> str:
        """Return an id for another request of ``backend``."""
        if not self._left:
            block = os.urandom(_BLOCK * _RANDOM_BYTES).hex()
            self._left = [block[start : start + 2 * _RANDOM_BYTES] for start in range(0, len(block), 2 * _RANDOM_BYTES)]
        return self._left.pop() + backend_mark(backend)


@lru_cache(4096)
def backend_mark(backend: str) -> str:
    """Return the digits by which the ids of a backend's kept requests end. They do not show its tag."""
    return hashlib.sha256(backend.encode()).hexdigest()[:_BACKEND_DIGITS]


def mark_of(id_: str) -> str | None:
    """Return the mark of the backend in an id; None if it cannot be the id of a kept request."""
    return id_[-_BACKEND_DIGITS:] if _ID.fullmatch(id_) else None


def key_digest(endpoint: str, credentials: bytes, key: str) -> str:
    """Return the name under which an idempotency key is stored; its scope is the endpoint and the credentials.

    Neither the key nor the credentials can be read from it.
    """
    hashed = hashlib.sha256(credentials).digest() if credentials else _NO_CREDENTIALS
    return _digest((endpoint.encode(), hashed, key.encode()))


def fingerprint(*parts: bytes) -> str:
    """Return a digest by which two requests with the same idempotency key are compared."""
    return _digest(parts)


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join([b"%d:%b" % (len(part), part) for part in parts])).hexdigest()


@dataclass(slots=True)
class Result:
    """The kept reply of a request."""

    reply: Reply
    pieces: list[Piece] = field(default_factory=list[Piece])
    """Of a streamed reply: how its body divides into values. Empty for a whole reply."""

    def dump(self) -> bytes:
        """Return it as one string: the fields of the reply, each behind its length."""
        fields = self.reply.fields()
        if self.pieces:
            fields += (_PIECES_FIELD, orjson.dumps(self.pieces))
        return b"".join([b"%d:%b" % (len(field), field) for field in fields])

    @classmethod
    def load(cls, raw: bytes) -> Result:
        """Read what `dump` wrote. Raises `WireError` for anything else."""
        fields, at = list[bytes](), 0
        while at < len(raw):
            colon = raw.find(b":", at, at + _LENGTH_DIGITS)
            length = raw[at:colon]
            if colon < 0 or not length.isdigit() or len(raw) <= colon + int(length) - 1:
                raise WireError("a kept result cannot be read")
            at = colon + 1 + int(length)
            fields.append(raw[colon + 1 : at])
        if len(fields) % 2:
            raise WireError("a kept result has a field without a value")
        named = dict(zip(fields[::2], fields[1::2], strict=True))
        return cls(Reply.of(named), _load_pieces(named.get(_PIECES_FIELD)))

    @property
    def is_large(self) -> bool:
        """Whether the body is a claim check: it lies in a key of its own."""
        return self.reply.large


def _load_pieces(raw: bytes | None) -> list[Piece]:
    if raw is None:
        return []
    try:
        pieces = [
            (codec, size, more)
            for codec, size, more in orjson.loads(raw)
            if type(codec) is str and type(size) is int and size >= 0 and type(more) is bool
        ]
    except (ValueError, TypeError):
        raise WireError("the pieces of a kept result cannot be read") from None
    return pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """The status of a submitted request. Times are Unix times in seconds, by the broker's clock."""

    id: str = field(repr=False)
    """The secret by which its status and its result are read."""
    status: str
    """``queued``, ``running``, ``succeeded``, ``failed`` or ``cancelled``."""
    endpoint: str = ""
    request_id: str = ""
    """Its ``X-Request-Id``, as logs have it."""
    created: float = 0.0
    started: float | None = None
    """When its last run began; None before the first one."""
    finished: float | None = None
    deliveries: int = 0
    """How often a replica has begun to run it. More than one: a replica died, or it was cancelled and given back."""
    attempts: int = 0
    """How often its code has been called."""
    replica: str = ""
    """The tag of the replica that runs it, or ran it last."""
    queue_depth: int | None = None
    """While it is queued: the number of unsettled requests of its backend, itself included."""
    progress: Any = None
    """The value that the code reported last by ``request.report_progress``."""
    error: dict[str, str] | None = None
    """Of a failed one: ``{"type", "message"}``."""

    @property
    def is_final(self) -> bool:
        """Whether it will not change any more."""
        return self.status in FINAL

    def to_dict(self) -> dict[str, Any]:
        """Return the members that it has, as HTTP shows them."""
        members = {
            "id": self.id,
            "status": self.status,
            "endpoint": self.endpoint,
            "request_id": self.request_id,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "deliveries": self.deliveries,
            "attempts": self.attempts,
            "replica": self.replica or None,
            "queue_depth": self.queue_depth,
            "progress": self.progress,
            "error": self.error,
        }
        return {name: value for name, value in members.items() if value is not None and value != ""}


STATUS_FIELDS = (
    "status",
    "endpoint",
    "request_id",
    "created",
    "started",
    "finished",
    "deliveries",
    "attempts",
    "replica",
    "progress",
    "error",
)
"""The fields of a record that a status is read from, in this order."""


def load_status(id_: str, values: Sequence[bytes | None], depth: int | None) -> RequestStatus:
    """Read the `STATUS_FIELDS` of a record. Raises `WireError`: they cannot be read."""
    named = dict(zip(STATUS_FIELDS, values, strict=True))
    try:
        text = {name: (named[name] or b"").decode() for name in ("status", "endpoint", "request_id", "replica")}
        progress, error = named["progress"], named["error"]
        return RequestStatus(
            id=id_,
            **text,
            created=_seconds(named["created"]) or 0.0,
            started=_seconds(named["started"]),
            finished=_seconds(named["finished"]),
            deliveries=int(named["deliveries"] or 0),
            attempts=int(named["attempts"] or 0),
            queue_depth=depth if text["status"] == QUEUED else None,
            progress=None if progress is None else exact_json.loads(progress),
            error=cast("dict[str, str]", exact_json.loads(error)) if error else None,
        )
    except ValueError as e:
        raise WireError(f"the record of a kept request cannot be read: {e}") from None


def _seconds(raw: bytes | None) -> float | None:
    return None if not raw else int(raw) / 1000
