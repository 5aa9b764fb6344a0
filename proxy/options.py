"""Options of one proxy, with the defaults that ``serve.HTTPOptions`` shows to users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .http1.buffers import default_bytes
from .http1.connection_limit import MAX_CONNECTIONS

if TYPE_CHECKING:
    from starlette.middleware import Middleware


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """The fields of ``serve.HTTPOptions`` that a proxy needs; they are described there."""

    host: str = "127.0.0.1"
    port: int = 8000
    middlewares: Sequence[Middleware] = ()
    proxies_per_node: int = 1
    request_timeout_s: float = 60.0
    max_body_bytes: int = 64 * 1024 * 1024
    max_buffered_bytes: int | None = None
    max_connections: int = MAX_CONNECTIONS
    drain_delay_s: float = 5.0
    unready_after_s: float = 10.0
    root_path: str = ""
    admin_port: int | None = None
    admin_host: str = "127.0.0.1"
    admin_token: str | None = None
    """The digest of the token."""
    ray_serve_metrics: bool = False
    debug: bool = False
    access_log: bool = False

    @classmethod
    def from_fields(cls, options: Mapping[str, Any]) -> ProxyOptions:
        """Return the options with those fields of ``options`` that a proxy needs."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    @property
    def buffered_bytes(self) -> int:
        """The memory budget for bodies: ``max_buffered_bytes``, or the default for this machine."""
        if self.max_buffered_bytes is not None:
            return self.max_buffered_bytes
        return default_bytes(self.max_body_bytes, self.proxies_per_node)


DEFAULTS = ProxyOptions()
