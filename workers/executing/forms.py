"""Form bodies of requests: limited before they are parsed, and parsed on a thread if they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import FormData

from ...handles.errors import MalformedBody

_LARGE_BYTES = 64 * 1024
"""Size from which on a form is parsed on a thread. The parser is Python code and takes up to 0.1 us per byte."""


def check_fields(content_type: str, body: bytes, max_fields: float) -> None:
    """Raise `MalformedBody` if a form has more than ``max_fields`` separators. Only for urlencoded forms.

    The limit of the parser itself counts only fields that are not empty: a body of ``&`` alone would pass it.
    """
    if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return
    if (count := body.count(b"&")) > max_fields:
        raise MalformedBody(f"the body is a form with {count} separators, for at most {max_fields:g} fields")


async def parse_form(parse: Coroutine[Any, Any, FormData], size: int) -> FormData:
    """Return the result of ``parse``, which must not wait for I/O. It runs on a thread if the form is large."""
    if size <= _LARGE_BYTES:
        return await parse
    return await asyncio.to_thread(asyncio.run, parse)
