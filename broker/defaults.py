"""Defaults of ``redis_url`` and ``instance``: those of the process's own instance, else those of the environment.

Replicas and proxies belong to an instance. Their URL may contain a password, so it is kept in memory and removed from
the environment, which the processes that user code starts would inherit. So is the admin token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from .errors import ConfigError
from .transport.url import REDIS_URL

INSTANCE = "PENSTOCK_INSTANCE"
"""The environment variable with the name of the instance, for calls without ``instance``."""
REPLICA_REDIS_URL = "PENSTOCK_REPLICA_REDIS_URL"
"""The environment variable with the broker's URL for replicas, with a Redis user of their own."""
PROXY_REDIS_URL = "PENSTOCK_PROXY_REDIS_URL"
"""The environment variable with the broker's URL for proxies, with a Redis user of their own."""
ADMIN_TOKEN = "PENSTOCK_ADMIN_TOKEN"
"""The environment variable with the ``admin_token`` of a ``serve.start`` that has an ``admin_port``."""
DEFAULT_INSTANCE = "default"


class _Own(NamedTuple):
    url: str
    instance: str


_own: _Own | None = None


def adopt_environment(environment: Mapping[str, str]) -> None:
    """Set variables of the process that called ``serve.start``. Those of this node, or of a runtime_env, go first."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def belong_to(url: str, instance: str) -> None:
    """Make these the defaults of this process, and remove the URLs of brokers and the token from its environment."""
    global _own
    _own = _Own(url, instance)
    for name in (REDIS_URL, REPLICA_REDIS_URL, PROXY_REDIS_URL, ADMIN_TOKEN):
        os.environ.pop(name, None)
    os.environ[INSTANCE] = instance  # not a secret, and useful to commands that user code starts


def default_url() -> str | None:
    """Return the URL of the process's own instance, or ``PENSTOCK_REDIS_URL``; None if there is neither."""
    return _own.url if _own is not None else os.environ.get(REDIS_URL) or None


def default_instance() -> str:
    """Return the name of the process's own instance, or ``PENSTOCK_INSTANCE``, or ``"default"``."""
    return _own.instance if _own is not None else os.environ.get(INSTANCE) or DEFAULT_INSTANCE


def needed_url(url: str | None) -> str:
    """Return ``url`` or the default. Raises `ConfigError` if there is neither."""
    if not (found := url or default_url()):
        raise ConfigError(f"connect needs a redis_url, or {REDIS_URL} in the environment")
    return found
