"""What a handle says of the requests it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a handle calls its endpoint; see ``ServeHandle.options``."""

    method_name: str = "__call__"
    shard_key: str | None = None
    http_method: str = "GET"
    http_headers: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method_name", str), ("http_method", str), ("http_headers", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, not {type(getattr(self, name)).__name__}")
        if self.method_name.startswith("_") and self.method_name != "__call__":
            raise ConfigError(f"method_name {self.method_name!r} is private: names starting with '_' cannot be called")
        if not self.method_name.isidentifier():
            raise ConfigError(f"method_name {self.method_name!r} is not the name of a method")
        if self.shard_key is not None and not isinstance(self.shard_key, str):
            raise TypeError(f"shard_key must be a str or None, not {type(self.shard_key).__name__}")
        for name, value in self.http_headers.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(
                    f"http_headers must map str to str, not {type(name).__name__} to {type(value).__name__}"
                )
        if self.timeout_s is not None:
            if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)):
                raise TypeError(f"timeout_s must be a number of seconds or None, not {type(self.timeout_s).__name__}")
            if not 0 < self.timeout_s < float("inf"):
                raise ConfigError(f"timeout_s must be a positive number of seconds, not {self.timeout_s}")

    def with_(self, changes: Mapping[str, Any]) -> Options:
        """Return these options but for ``changes``. Raises ``TypeError`` for a name that is none."""
        known = [option.name for option in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"options() has no {name!r}; it has {', '.join(known)}")
        return replace(self, **changes)
