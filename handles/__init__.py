"""The thin client: sync and asyncio handles, batch producers and errors, from a Redis URL alone."""

from . import errors
from .batch.batch import Batch
from .batch.items import BatchItem, BatchResult
from .batch.producer import BatchProducer
from .connection import connect
from .files.rows import Rows, read
from .handle import AsyncServeHandle, ServeHandle

__all__ = [
    "AsyncServeHandle",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchResult",
    "Rows",
    "ServeHandle",
    "connect",
    "errors",
    "read",
]
