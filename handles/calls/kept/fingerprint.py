"""Fingerprint of a request: equal for two requests that may share an idempotency key."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import orjson

from ....broker.wire import exact_json
from ....broker.wire.kept import fingerprint
from ....broker.wire.requests import Header

_HASHED_HERE_BYTES = 256 * 1024
"""A longer body is hashed on a thread, so that the loop goes on."""


async def fingerprint_of(header: Header, body: bytes) -> str:
    """Return the hash of method, path, query, content type, codec, call method and body."""
    if len(body) > _HASHED_HERE_BYTES:
        body_hash = await asyncio.get_running_loop().run_in_executor(None, _sha256, body)
    else:
        body_hash = _sha256(body)
    query, content_type = header.query, ""
    for name, value in header.headers:
        if name == "content-type":
            content_type = value
            break
    return fingerprint(
        header.method.encode(),
        header.path.encode("utf-8", "surrogatepass"),
        query.encode("utf-8", "surrogatepass") if isinstance(query, str) else _sorted_json(query),
        content_type.encode("utf-8", "surrogatepass"),
        header.codec.encode(),
        header.call.encode(),
        body_hash,
    )


def _sha256(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _sorted_json(query: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(query, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # long integers or lone surrogates
        return exact_json.dumps({name: query[name] for name in sorted(query)})
