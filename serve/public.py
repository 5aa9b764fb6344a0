"""What `penstock.serve` exports, and all that it takes."""

from ..handles import AsyncServeHandle, ServeHandle, errors
from ..workers.accept_batch import accept_batch
from ..workers.context import get_current_backend_tag, get_current_replica_tag
from ..workers.request import Request
from .client import Client
from .config import AutoscalingConfig, BackendConfig, HTTPOptions
from .controller import ControllerActor
from .doors import connect, start

__all__ = [
    "AsyncServeHandle",
    "AutoscalingConfig",
    "BackendConfig",
    "Client",
    "ControllerActor",
    "HTTPOptions",
    "Request",
    "ServeHandle",
    "accept_batch",
    "connect",
    "errors",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "start",
]
