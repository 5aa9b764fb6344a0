"""Access log: one INFO line for each request to an endpoint, and for each that no endpoint takes.

The pages of the proxy itself are not logged. Neither is what a middleware answers in place of the application.
"""

from __future__ import annotations

import logging

from ..broker.registry.records import EndpointRecord
from ..handles.log_context import NamedWork, working_on

log = logging.getLogger("penstock.access")


class AccessLog:
    """Writes the lines, whatever the level of other log lines is."""

    def __init__(self) -> None:
        log.setLevel(logging.INFO)

    def write(
        self,
        method: str,
        path: str,
        status: int,
        took_s: float,
        *,
        request_id: bytes,
        endpoint: EndpointRecord | None,
        backend: str,
    ) -> None:
        """Log one request.

        Args:
            method: the HTTP method.
            path: the path without the query, which may contain secrets.
            status: the status of the response; 499 if the client disconnected before it.
            took_s: seconds from the head of the request to the end of the response.
            request_id: the id that the response carries.
            endpoint: the endpoint that took the request.
            backend: the backend that it was sent to; empty if it was sent to none.
        """
        # Anything may stand in a path, percent-encoded: a line feed would begin a line of the client's own.
        shown_path = path if path.isascii() and path.isprintable() else ascii(path)[1:-1]
        name, route = ("", None) if endpoint is None else (endpoint.name, endpoint.route)
        took_ms = round(took_s * 1000.0, 3)
        fields = {
            "method": method,
            "path": shown_path,
            "route": route,
            "status": status,
            "ms": took_ms,
            "endpoint": name,
            "backend": backend,
        }
        with working_on([NamedWork(request_id.decode("latin-1"))]):
            log.info("%s %s %d %.1f ms %s", method, shown_path, status, took_ms, backend or "-", extra=fields)
