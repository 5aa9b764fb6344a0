"""The names that ``penstock.serve`` exports, and their imports."""

from ..handles import (
    AsyncObjectRefHandle,
    AsyncResponseStream,
    AsyncServeHandle,
    AsyncStreamingHandle,
    Batch,
    BatchItem,
    BatchProducer,
    BatchProgress,
    BatchResult,
    DeadLetter,
    DeadLetters,
    ObjectRefHandle,
    ResponseStream,
    ServeHandle,
    StreamingHandle,
    errors,
)
from ..workers.asgi.application import asgi
from ..workers.executing.accept_batch import accept_batch
from ..workers.executing.context import get_current_backend_tag, get_current_replica_tag
from ..workers.executing.request import Request
from ..workers.multiplexed import get_multiplexed_model_id, multiplexed
from ..workers.retry import Retry
from .client import Client
from .config import AutoscalingConfig, BackendConfig, HTTPOptions, RetryConfig
from .lifecycle import connect, start
from .status.status import Status
from .validation import ALL_METHODS

__all__ = [
    "ALL_METHODS",
    "AsyncObjectRefHandle",
    "AsyncResponseStream",
    "AsyncServeHandle",
    "AsyncStreamingHandle",
    "AutoscalingConfig",
    "BackendConfig",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchProgress",
    "BatchResult",
    "Client",
    "DeadLetter",
    "DeadLetters",
    "HTTPOptions",
    "ObjectRefHandle",
    "Request",
    "ResponseStream",
    "Retry",
    "RetryConfig",
    "ServeHandle",
    "Status",
    "StreamingHandle",
    "accept_batch",
    "asgi",
    "connect",
    "errors",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "get_multiplexed_model_id",
    "multiplexed",
    "start",
]
