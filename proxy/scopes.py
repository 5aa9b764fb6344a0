"""What of a request's ASGI scope travels to the replica beside the header: what it cannot derive from that.

The scope in the replica is the one that the proxy's application saw, after its middlewares: behind a proxy that
terminates TLS the scheme is ``https``, and what an authenticating middleware noted in ``request.state`` arrives, as far
as it is JSON. A plain request differs in nothing, so that neither its entry nor its way grows.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import orjson
from starlette.types import Scope

from ..broker.wire._fields import RAW_PATH_SAFE

_JSON_ALONE = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_MAX_HOSTS = 256

_hosts: dict[Any, bytes] = {}
"""The host header from which a replica derives each address that this process listens on."""


def carried(scope: Scope, host: bytes | None, path: str, root_path: str) -> dict[str, Any] | None:
    """Return the members of ``scope`` that a replica would not have otherwise; None if there are none.

    Args:
        scope: of the request.
        host: its host header.
        path: as the header has it.
        root_path: the prefix of all routes, unless the scope has one of its own.
    """
    raw: bytes | None
    try:
        raw, server, client = scope["raw_path"], scope["server"], scope["client"]
        # Nearly every request ends here, for less than 0.5 us.
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
    except (AttributeError, KeyError, TypeError):  # some of it is missing, or the address is new
        raw, server, client = scope.get("raw_path"), scope.get("server"), scope.get("client")
    if server.__class__ is list:  # a middleware may write it as JSON would
        server = tuple(server)
    members: dict[str, Any] = {}
    if root := scope.get("root_path") or root_path:
        members["root_path"] = root
    if (state := scope.get("state")) and (kept := _as_far_as_json(state)):
        members["state"] = kept
    if raw is not None:
        if path != scope["path"]:  # whoever stands before us has taken the prefix away
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


def _as_far_as_json(state: Any) -> dict[str, Any]:
    """Return the members of ``state`` that are the same after a way through JSON."""
    try:
        members: dict[Any, Any] = dict(state)
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in members.items() if _is_json(name, value)}


def _is_json(name: Any, value: Any) -> bool:
    try:
        return bool(orjson.loads(orjson.dumps({name: value}, option=_JSON_ALONE)) == {name: value})
    except Exception:  # besides what is no JSON, what the comparison of a stranger's object raises
        return False
