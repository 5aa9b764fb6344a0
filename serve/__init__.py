"""The public API for processes that serve: start, connect, Client and its configuration.

It lies in `_api`, which is loaded when the first of it is used: Ray takes a second, and some of the commands, whose
modules are below this package, need none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._api import (
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
        ServeHandle,
        Status,
        StreamingHandle,
        accept_batch,
        connect,
        errors,
        get_current_backend_tag,
        get_current_replica_tag,
        start,
    )
else:

    def __getattr__(name: str) -> object:
        # `ControllerActor` is for Ray alone; see there.
        if name not in __all__ and name != "ControllerActor":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # One module, for whoever uses whichever of it: threads that load it meet at one lock.
        return getattr(import_module("._api", __name__), name)


__all__ = [
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
    "ServeHandle",
    "Status",
    "StreamingHandle",
    "accept_batch",
    "connect",
    "errors",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "start",
]


def __dir__() -> list[str]:
    return __all__
