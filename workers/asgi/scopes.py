"""ASGI scopes of requests to an application that is mounted below its endpoint's route.

An endpoint whose route ends in ``/{name:path}`` mounts the application: what precedes is its ``root_path``. Any other
route leaves the path as it is. Path parameters that precede are in ``path_params``, as below Starlette's ``Mount``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import Scope

from ...broker.wire.requests import HTTP_CODEC, Entry
from ...handles.errors import MalformedBody
from ..executing.request import Request

_CONTENT_TYPES = {
    "json": b"application/json",
    "text": b"text/plain; charset=utf-8",
    "bytes": b"application/octet-stream",
    "none": b"",
}
"""The content types of bodies from handles, by their codecs."""

EXTENSION = "penstock"
"""The name of Penstock's ASGI extension (https://asgi.readthedocs.io/en/latest/extensions.html)."""


def http_scope(entry: Entry, state: Mapping[str, Any], on_progress: Callable[[bytes], None] | None = None) -> Scope:
    """Return the scope of a request, with a copy of the lifespan's ``state``.

    Args:
        entry: the request.
        state: the state that the lifespan of the application has stored.
        on_progress: records the progress of a kept request, as JSON. None drops it.

    Raises:
        MalformedBody: a handle sent a body that is pickled.
    """
    header = entry.header
    request = Request(entry, on_progress=on_progress)
    scope = request.scope
    scope["extensions"] = {EXTENSION: {"report_progress": request.report_progress}}
    scope["state"] = {**state, **scope["state"]}
    params: dict[str, Any] = scope["path_params"]
    mount = None if header.scope is None else header.scope.get("mount")
    if isinstance(mount, str) and isinstance(rest := params.get(mount), str):
        path: str = scope["path"]
        if path.endswith("/" + rest):
            scope["root_path"] = path[: len(path) - len(rest) - 1]
            scope["path_params"] = params = {name: value for name, value in params.items() if name != mount}
    if not params:
        del scope["path_params"]
    if header.codec != HTTP_CODEC:
        _describe_body(scope, header.codec, len(entry.body))
    return scope


def _describe_body(scope: Scope, codec: str, length: int) -> None:
    """Add the headers that a body of a handle has over HTTP, unless the call gave them."""
    if (content_type := _CONTENT_TYPES.get(codec)) is None:
        raise MalformedBody(
            f"an ASGI application reads bytes, and the body is written as {codec!r}: send None, bytes, a str or a JSON "
            "value"
        )
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    given = {name for name, _ in headers}
    if content_type and b"content-type" not in given:
        headers.append((b"content-type", content_type))
    if content_type and b"content-length" not in given:
        headers.append((b"content-length", b"%d" % length))
