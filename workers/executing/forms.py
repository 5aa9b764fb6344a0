"""Content types of requests, and their form bodies: limited before they are parsed, on a thread if they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import FormData

from ...broker.wire._fields import Pairs
from ...broker.wire.requests import HTTP_CODEC, Entry
from ...handles.errors import MalformedBody

_LARGE_BYTES = 64 * 1024
"""Size from which on a form is parsed on a thread. The parser is Python code and takes up to 0.1 us per byte."""


def content_type_of(headers: Pairs) -> str:
    """Return the content type without its parameters, in lower case; an empty string without one."""
    for name, value in headers:
        if name == "content-type":
            return value.partition(";")[0].strip().lower()
    return ""


def is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")


def undecoded_hint(entry: Entry, error: BaseException) -> str:
    """Return what to add to the message of ``error`` if user code took the bytes of a JSON body for its value.

    ``curl -d '{}'`` declares a form, so ``request.data`` is bytes, and ``request.data["name"]`` a `TypeError`.
    """
    if not issubclass(type(error), TypeError | AttributeError) or entry.header.codec != HTTP_CODEC:
        return ""
    content_type = content_type_of(entry.header.headers)
    if entry.body.lstrip()[:1] not in (b"{", b"[") or is_json(content_type):
        return ""
    said = f"the content type is {content_type!r}" if content_type else "there is no content type"
    return (
        f" (the request's data is bytes, because {said}: send the header 'content-type: application/json', or read "
        "`await request.json()`)"
    )


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
