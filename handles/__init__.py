"""Calling a backend from Python with nothing but a Redis URL: sync and asyncio handles, batch producers, errors."""

from . import errors
from .batch import Batch, BatchProducer
from .connection import connect
from .handle import AsyncServeHandle, ServeHandle
from .items import BatchItem, BatchResult

__all__ = [
    "AsyncServeHandle",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchResult",
    "ServeHandle",
    "connect",
    "errors",
]
