"""Calling a backend from Python with nothing but a Redis URL: sync and asyncio handles, batch producers, errors."""

from . import errors
from .connection import connect
from .handle import AsyncServeHandle, ServeHandle

__all__ = ["AsyncServeHandle", "ServeHandle", "connect", "errors"]
