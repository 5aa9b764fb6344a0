"""Request headers of kept requests: ``Prefer`` (RFC 7240) and ``Idempotency-Key``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..broker.wire.kept import MAX_KEY_CHARS
from ..handles.errors import ConfigError

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PREFERENCE = re.compile(
    rf"\s*({_TOKEN})(?:\s*=\s*(?:({_TOKEN})|\"((?:[^\"\\]|\\.)*)\"))?\s*(?:;(?:[^,\"]|\"(?:[^\"\\]|\\.)*\")*)?"
)
_SECONDS = re.compile(r"\d{1,9}")

_KEY_STRING = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
"""RFC 8941, section 3.3.3."""
_KEY_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z:/]+")
"""RFC 8941, section 3.3.4; the first character may be any."""

RawHeaders = Iterable[tuple[bytes, bytes]]


class Preferences(NamedTuple):
    """The preferences of a client that this proxy can apply."""

    respond_async: bool = False
    wait_s: int | None = None
    """Seconds to wait for the result."""


def may_be_kept(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request has any of these headers. All others pass by this at the cost of two look-ups."""
    return b"idempotency-key" in headers or b"prefer" in headers


def preferences_of(headers: RawHeaders) -> Preferences:
    """Read the ``Prefer`` headers of a request.

    Malformed and unknown preferences are ignored, and of a preference that is given twice the first counts (RFC 7240,
    section 2).
    """
    respond_async, wait_s = False, None
    for name, value in _listed(headers):
        if name == "respond-async" and not value:
            respond_async = True
        elif name == "wait" and wait_s is None and _SECONDS.fullmatch(value):
            wait_s = int(value)
    return Preferences(respond_async, wait_s)


def idempotency_key_of(headers: RawHeaders) -> str | None:
    """Return the ``Idempotency-Key`` of a request; None if it has none.

    Raises:
        ConfigError: there are several, or it is neither a string of RFC 8941 nor a token, or it is too long.
    """
    raw = [value for name, value in headers if name == b"idempotency-key"]
    if not raw:
        return None
    if len(raw) > 1:
        raise ConfigError(f"a request may have one Idempotency-Key, not {len(raw)}")
    text = raw[0].decode("latin-1").strip(" \t")
    if (string := _KEY_STRING.fullmatch(text)) is not None:
        key = re.sub(r"\\(.)", r"\1", string[1])
    elif _KEY_TOKEN.fullmatch(text) is not None:
        key = text
    else:
        shown = repr(text) if len(text) <= MAX_KEY_CHARS else f"a value of {len(text)} characters"
        raise ConfigError(f'an Idempotency-Key must be a quoted string ("…", RFC 8941) or a token, not {shown}')
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise ConfigError(f"an Idempotency-Key must have 1 to {MAX_KEY_CHARS} characters, not {len(key)}")
    return key


def _listed(headers: RawHeaders) -> Iterator[tuple[str, str]]:
    for name, value in headers:
        if name != b"prefer":
            continue
        text, at = value.decode("latin-1"), 0
        while at < len(text):
            found = _PREFERENCE.match(text, at)
            end = at if found is None else found.end()
            if found is not None and (end == len(text) or text[end] == ","):
                yield found[1].lower(), found[2] or found[3] or ""
                at = end + 1
            else:
                comma = text.find(",", at)
                at = len(text) if comma < 0 else comma + 1
