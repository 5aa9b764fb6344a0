"""Connecting commands to an instance."""

from __future__ import annotations

from ..client import Client
from ..lifecycle import connect
from .options import telling_what_is_wrong


def client_of(redis_url: str | None, instance: str) -> Client:
    with telling_what_is_wrong():
        return connect(redis_url, instance)
