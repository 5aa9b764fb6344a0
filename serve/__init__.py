"""The public API of serving processes: start, connect, Client and its configuration.

The names are defined in `_api`, which is imported on first use: some commands of `penstock.serve.cli` do not need it.
Ray, whose import takes a second, is imported where it is needed, so that a wrong argument is reported without it.
"""

from typing import TYPE_CHECKING

from ..runtime.extras import needed

if TYPE_CHECKING:
    from ._api import (
        ALL_METHODS,
        AsyncObjectRefHandle,
        AsyncResponseStream,
        AsyncServeHandle,
        AsyncStreamingHandle,
        AutoscalingConfig,
        BackendConfig,
        Batch,
        BatchItem,
        BatchProducer,
        BatchProgress,
        BatchResult,
        Client,
        DeadLetter,
        DeadLetters,
        HTTPOptions,
        ObjectRefHandle,
        Request,
        ResponseStream,
        Retry,
        RetryConfig,
        ServeHandle,
        Status,
        StreamingHandle,
        accept_batch,
        asgi,
        connect,
        errors,
        get_current_backend_tag,
        get_current_replica_tag,
        get_multiplexed_model_id,
        multiplexed,
        start,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # All names come from one module, so that threads that import them at the same time wait for one import lock.
        return getattr(needed(f"{__name__}._api", __name__), name)


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


def __dir__() -> list[str]:
    return __all__
