"""Forms of requests: bounded before they are parsed, and parsed off the event loop where they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import FormData

from ...handles.errors import MalformedBody

_LARGE_BYTES = 64 * 1024
"""The parser is Python code and takes up to 0.1 us for a byte: some milliseconds for so many."""


def check_fields(content_type: str, body: bytes, max_fields: float) -> None:
    """Raise `MalformedBody` if an urlencoded form has more separators than fields are allowed.

    The parser counts only fields that are not empty, so that its own limit stops no body of ``&`` alone.
    """
    if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return
    if (count := body.count(b"&")) > max_fields:
        raise MalformedBody(f"the body is a form with {count} separators, for at most {max_fields:g} fields")


async def parse_form(parse: Coroutine[Any, Any, FormData], size: int) -> FormData:
    """Return what ``parse`` returns, which waits for nothing, on a thread if the form has many bytes."""
    if size <= _LARGE_BYTES:
        return await parse
    return await asyncio.to_thread(asyncio.run, parse)
