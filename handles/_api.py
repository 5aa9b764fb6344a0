"""The names that ``penstock.handles`` exports, and their imports."""

from ..broker.queue.dead_letters import DeadLetter
from ..broker.wire.kept import RequestStatus
from .async_handle import AsyncObjectRefHandle, AsyncServeHandle, AsyncStreamingHandle
from .batch.batch import Batch
from .batch.items import BatchItem, BatchResult
from .batch.producer import BatchProducer
from .batch.progress import BatchProgress
from .calls.submitted import AsyncSubmitted, Submitted
from .connection import Connection, connect
from .dead_letters import DeadLetters
from .files.rows import Rows, read
from .handle import ObjectRefHandle, ServeHandle, StreamingHandle
from .replies.response import Response
from .replies.response_stream import AsyncResponseStream, ResponseStream

__all__ = [
    "AsyncObjectRefHandle",
    "AsyncResponseStream",
    "AsyncServeHandle",
    "AsyncStreamingHandle",
    "AsyncSubmitted",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchProgress",
    "BatchResult",
    "Connection",
    "DeadLetter",
    "DeadLetters",
    "ObjectRefHandle",
    "RequestStatus",
    "Response",
    "ResponseStream",
    "Rows",
    "ServeHandle",
    "StreamingHandle",
    "Submitted",
    "connect",
    "read",
]
