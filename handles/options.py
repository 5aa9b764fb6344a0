"""Options of a handle: method, headers, shard key, timeout, kind of reply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict, cast

from ..broker.registry.records import EndpointRecord
from ..broker.wire._fields import Pairs
from ..broker.wire.kept import MAX_KEY_CHARS
from .errors import CallMethodRefused, ConfigError

_HTTP_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110, section 5.6.2."""
_HEADER_NAME = _HTTP_METHOD
_NOT_IN_VALUE = re.compile("[^\t\x20-\x7e\x80-\xff]")
"""A character that a field value cannot have (RFC 9110, section 5.5), in ISO 8859-1 as HTTP servers use it."""
_MAX_TIMEOUT_S = 1e9
RETURN_TYPES = ("future", "object_ref")


MODEL_ID_HEADER = "x-serve-model-id"
"""The header by which a request names a model, for code with loaders (``serve.multiplexed``)."""


def model_id_of(headers: Pairs) -> str:
    """Return the model that the header fields of a request name; an empty string if they name none."""
    return next((value for name, value in headers if name == MODEL_ID_HEADER), "")


class CallChanges(TypedDict, total=False):
    """Options that leave the class of a handle as it is; see `ServeHandle.options`."""

    method_name: str
    shard_key: str | None
    http_method: str
    http_path: str
    http_headers: Mapping[str, str]
    timeout_s: float | None
    model_id: str | None


class ReplyChanges(CallChanges, total=False):
    """`CallChanges` of a handle whose replies are whole."""

    idempotency_key: str | None


class HandleChanges(ReplyChanges, total=False):
    """All options of a handle."""

    return_type: str
    stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """Options of the calls of a handle; see `ServeHandle.options`.

    Raises:
        TypeError: an option has the wrong type.
        ConfigError: an option has a value that is not allowed.
    """

    method_name: str = "__call__"
    shard_key: str | None = None
    http_method: str = "GET"
    http_path: str = "/"
    http_headers: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_s: float | None = None
    return_type: str = "future"
    stream: bool = False
    idempotency_key: str | None = None
    model_id: str | None = None

    def __post_init__(self) -> None:
        _check(self.method_name, self.shard_key, self.http_method, self.http_headers, self.timeout_s)
        _check_path(self.http_path)
        if not isinstance(cast(object, self.return_type), str):
            raise TypeError(f"return_type must be a str, not {type(self.return_type).__name__}")
        if self.return_type not in RETURN_TYPES:
            raise ConfigError(f"return_type must be one of {', '.join(RETURN_TYPES)}, not {self.return_type!r}")
        if not isinstance(cast(object, self.stream), bool):
            raise TypeError(f"stream must be a bool, not {type(self.stream).__name__}")
        if self.stream and self.return_type != "future":
            raise ConfigError(
                f"stream=True returns an iterator, and return_type={self.return_type!r} another thing: choose one"
            )
        if self.idempotency_key is not None:
            check_idempotency_key(self.idempotency_key)
            if self.stream:
                raise ConfigError(
                    "stream=True does not go with an idempotency_key: a repeated request gets a whole reply"
                )
        if self.model_id is not None:
            check_model_id(self.model_id)
        # A copy: the caller may change the mapping.
        object.__setattr__(self, "http_headers", dict(self.http_headers))

    def with_(self, changes: Mapping[str, Any]) -> CallOptions:
        """Return these options with ``changes``.

        Raises:
            TypeError: a change has the name of no option, or a wrong type.
            ConfigError: a change has a value that is not allowed.
        """
        for name in changes:
            if name not in _NAMES:
                raise TypeError(f"options() has no {name!r}; it has {', '.join(_NAMES)}")
        if len(changes) == 1 and "idempotency_key" in changes and not self.stream:
            return self._with_key(changes["idempotency_key"])
        return replace(self, **changes)

    def _with_key(self, key: str | None) -> CallOptions:
        """Return these options with another idempotency key. A key is for one request, so this is made for each."""
        if key is not None:
            check_idempotency_key(key)
        changed = object.__new__(CallOptions)
        for name in _NAMES:
            object.__setattr__(changed, name, getattr(self, name))
        object.__setattr__(changed, "idempotency_key", key)
        return changed

    def shown(self) -> dict[str, str]:
        """Return the options that differ from their defaults, as a ``repr`` shows them, by name.

        Of the headers it shows the names alone, and of an idempotency key that there is one: they may be secrets.
        """
        defaults = CallOptions()
        shown = {name: repr(getattr(self, name)) for name in _NAMES if getattr(self, name) != getattr(defaults, name)}
        if "http_headers" in shown:
            shown["http_headers"] = f"<{', '.join(self.http_headers)}>"
        if self.idempotency_key is not None:
            shown["idempotency_key"] = "<set>"
        return shown


_NAMES = tuple(option.name for option in fields(CallOptions))


def check_call_method(endpoint: EndpointRecord, method_name: str) -> None:
    """Check that the endpoint offers the method.

    Raises:
        CallMethodRefused: it does not.
    """
    if not endpoint.allows(method_name):
        raise CallMethodRefused(endpoint.name, method_name, endpoint.call_methods or ())


def check_idempotency_key(key: object) -> str:
    """Return ``key`` if it can be an idempotency key.

    Raises:
        TypeError: it is not a string.
        ConfigError: it is not 1 to 255 printable ASCII characters.
    """
    if not isinstance(key, str):
        raise TypeError(f"idempotency_key must be a str or None, not {type(key).__name__}")
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        shown = repr(key) if len(key) <= MAX_KEY_CHARS else f"one of {len(key)} characters"
        raise ConfigError(f"an idempotency key must be 1 to {MAX_KEY_CHARS} printable ASCII characters, not {shown}")
    return key


def check_model_id(model_id: object) -> str:
    """Return ``model_id`` if it can name a model.

    Raises:
        TypeError: it is not a string.
        ConfigError: it is empty, or has a character that a header cannot have.
    """
    if not isinstance(model_id, str):
        raise TypeError(f"model_id must be a str or None, not {type(model_id).__name__}")
    if not model_id or model_id != model_id.strip() or _NOT_IN_VALUE.search(model_id) is not None:
        raise ConfigError(
            "model_id must be text that a header can have: not empty, characters of ISO 8859-1 without control "
            f"characters, no space around it; not {model_id!r}"
        )
    return model_id


def check_method_name(method_name: object) -> None:
    """Check that ``method_name`` can be the name of a public method.

    Raises:
        TypeError: it is not a ``str``.
        ConfigError: it is not an identifier, or it is private.
    """
    if not isinstance(method_name, str):
        raise TypeError(f"method_name must be a str, not {type(method_name).__name__}")
    if not method_name.isidentifier():
        raise ConfigError(f"method_name {method_name!r} is not the name of a method")
    if method_name.startswith("_") and method_name != "__call__":
        raise ConfigError(
            f"method_name {method_name!r} is private: methods whose names start with '_' cannot be called"
        )


def _check(
    method_name: object, shard_key: object, http_method: object, http_headers: object, timeout_s: object
) -> None:
    check_method_name(method_name)
    if not isinstance(http_method, str):
        raise TypeError(f"http_method must be a str, not {type(http_method).__name__}")
    if _HTTP_METHOD.fullmatch(http_method) is None:
        raise ConfigError(f"http_method {http_method!r} is not a method of HTTP")
    if shard_key is not None and not isinstance(shard_key, str):
        raise TypeError(f"shard_key must be a str or None, not {type(shard_key).__name__}")
    if not isinstance(http_headers, Mapping):
        raise TypeError(f"http_headers must be a dict of str, not {type(http_headers).__name__}")
    for name, value in cast("Mapping[object, object]", http_headers).items():
        _check_header(name, value)
    if timeout_s is not None:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
            raise TypeError(f"timeout_s must be a number of seconds or None, not {type(timeout_s).__name__}")
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise ConfigError(f"timeout_s must be above 0 and at most {_MAX_TIMEOUT_S:g} seconds, not {timeout_s}")


def _check_path(http_path: object) -> None:
    if not isinstance(http_path, str):
        raise TypeError(f"http_path must be a str, not {type(http_path).__name__}")
    if not http_path.startswith("/"):
        raise ConfigError(f"http_path {http_path!r} must begin with '/'")
    for char in "?#":
        if char in http_path:
            raise ConfigError(
                f"http_path {http_path!r} has {char!r}, before which the path of a URL ends: the query is given by the "
                "keyword arguments of a call"
            )


def _check_header(name: object, value: object) -> None:
    for text in (name, value):
        if not isinstance(text, str):
            raise TypeError(f"http_headers must map str to str; {text!r} is a {type(text).__name__}")
    if _HEADER_NAME.fullmatch(cast(str, name)) is None:
        raise ConfigError(
            f"http_headers has the name {name!r}: a header's name is made of ASCII letters, digits and !#$%&'*+-.^_`|~"
        )
    # The error shows the wrong character alone: the value may be a secret, such as a token with a line feed at its end.
    if (wrong := _NOT_IN_VALUE.search(cast(str, value))) is not None:
        raise ConfigError(
            f"http_headers has {wrong[0]!r} in the value of {name!r}: it may hold the characters of ISO 8859-1 but for "
            "control characters; percent-encode other text, or send it in the body"
        )
