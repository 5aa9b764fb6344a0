"""What the commands share that need more of an instance than its broker."""

from __future__ import annotations

from ..client import Client
from ..doors import connect
from .common import telling_what_is_wrong


def client_of(redis_url: str | None, instance: str) -> Client:
    with telling_what_is_wrong():
        return connect(redis_url, instance)
