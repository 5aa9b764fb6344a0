"""Public API for processes that only call: handles, batches, dead letters and errors. Needs Redis and no Ray.

The names but `errors` are defined in `_api`, which is imported on first use. Replicas use a few modules of this
package, and most of them never call anything: a third of the modules that a replica imported were for calling.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors

if TYPE_CHECKING:
    from ._api import (
        AsyncObjectRefHandle,
        AsyncResponseStream,
        AsyncServeHandle,
        AsyncStreamingHandle,
        AsyncSubmitted,
        Batch,
        BatchItem,
        BatchProducer,
        BatchProgress,
        BatchResult,
        Connection,
        DeadLetter,
        DeadLetters,
        ObjectRefHandle,
        RequestStatus,
        Response,
        ResponseStream,
        Rows,
        ServeHandle,
        StreamingHandle,
        Submitted,
        connect,
        read,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # All names come from one module, so that threads that import them at the same time wait for one import lock.
        return getattr(import_module("._api", __name__), name)


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
    "errors",
    "read",
]


def __dir__() -> list[str]:
    return __all__
