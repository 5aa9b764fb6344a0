"""The members of a request's ASGI scope that travel to the replica because it cannot derive them from the header.

The scope in the replica equals the scope that the proxy's application got from its middlewares. Behind a gateway that
terminates TLS the scheme is ``https``, and the members of ``request.state`` that an authenticating middleware set
arrive if they are JSON. A plain request has no such members, so neither its entry nor its cost grows.
"""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import quote

import orjson
from starlette.types import Scope

from ..broker.wire._fields import RAW_PATH_SAFE

_ONLY_JSON = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_MAX_HOSTS = 256

_hosts: dict[Any, bytes] = {}
"""Cache: for each address of this server, the host header from which a replica derives that address."""


def carried(scope: Scope, host: bytes | None, path: str, root_path: str) -> dict[str, Any] | None:
    """Return the members of ``scope`` that a replica cannot derive, or None if there are none.

    Args:
        scope: the scope of the request.
        host: its host header.
        path: its path as the wire header has it.
        root_path: the prefix of all routes, if the scope has none.
    """
    try:
        raw, server, client = scope["raw_path"], scope["server"], scope["client"]
        # Nearly every request returns here, in less than 0.5 us.
        if (
            host == _hosts[server]
            and raw.decode("latin-1") == path
            and "%" not in path
            and not (root_path or scope["root_path"] or scope["state"])
            and scope["scheme"] == "http"
            and scope["http_version"] == "1.1"
            and type(client[1]) is int
        ):
            return None
    except (AttributeError, KeyError, TypeError):  # a member is missing, or the address is new
        raw, server, client = scope.get("raw_path"), scope.get("server"), scope.get("client")
    if server.__class__ is list:  # a middleware may have set a list, as JSON has it
        server = tuple(cast("list[object]", server))
    members: dict[str, Any] = {}
    if root := scope.get("root_path") or root_path:
        members["root_path"] = root
    if (state := scope.get("state")) and (kept := _json_members(state)):
        members["state"] = kept
    if raw is not None:
        if path != scope["path"]:  # a gateway in front has stripped the prefix
            raw = quote(root_path, safe=RAW_PATH_SAFE).encode() + raw
        text = raw.decode("latin-1")
        if text != path or "%" in path:
            members["raw_path"] = text
    if server is not None and host != _host_of(server):
        members["server"] = list(server)
    if client is not None and type(client[1]) is not int:
        members["client"] = list(client)
    if (scheme := scope.get("scheme", "http")) != "http":
        members["scheme"] = scheme
    if (version := scope.get("http_version", "1.1")) != "1.1":
        members["http_version"] = version
    return members or None


def _host_of(server: Any) -> bytes:
    host = _hosts.get(server)
    if host is None:
        if len(_hosts) >= _MAX_HOSTS:
            _hosts.clear()
        host = _hosts[server] = f"{server[0]}:{server[1]}".encode("utf-8", "surrogatepass")
    return host


def _json_members(state: Any) -> dict[str, Any]:
    """Return the members of ``state`` that JSON preserves."""
    try:
        members: dict[Any, Any] = dict(state)
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in members.items() if _is_json(name, value)}


def _is_json(name: Any, value: Any) -> bool:
    try:
        return bool(orjson.loads(orjson.dumps({name: value}, option=_ONLY_JSON)) == {name: value})
    except Exception:  # not JSON, or the comparison of an unknown object failed
        return False
