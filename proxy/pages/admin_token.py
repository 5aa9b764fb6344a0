"""The admin token: who has it may change things at the admin port. Only its digest is kept and compared."""

from __future__ import annotations

import hashlib
import hmac
import re

from ...broker.errors import ConfigError

LEAST_CHARS = 16
"""The length of the shortest token that is allowed: a random token of this length cannot be guessed."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ALLOWED = re.compile(r"[\x21-\x7e]+")


def digest_of(token: str) -> str:
    """Return the digest of a token: ``sha256:`` and 64 hexadecimal digits. A digest is returned as it is.

    Raises:
        ConfigError: the token is too short, or has characters that no HTTP header has. The message does not show it.
    """
    if token.startswith("sha256:"):
        if _DIGEST.fullmatch(token) is None:
            raise ConfigError("HTTPOptions.admin_token begins with 'sha256:', so 64 hexadecimal digits must follow")
        return token
    if len(token) < LEAST_CHARS or _ALLOWED.fullmatch(token) is None:
        raise ConfigError(
            f"HTTPOptions.admin_token must be at least {LEAST_CHARS} printable ASCII characters without spaces, such "
            "as `openssl rand -hex 24` prints, or 'sha256:' and the digest of such a token"
        )
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def is_token(digest: str, authorization: bytes) -> bool:
    """Return whether the value of an ``Authorization`` header has the token of ``digest``, in constant time."""
    scheme, _, token = authorization.partition(b" ")
    given = f"sha256:{hashlib.sha256(token.strip()).hexdigest()}"
    return hmac.compare_digest(digest, given) and scheme.lower() == b"bearer"
