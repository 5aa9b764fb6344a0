"""The names that ``penstock.serve`` exports, with everything that they import."""

from ..handles import AsyncServeHandle, ServeHandle, errors
from ..workers.executing.accept_batch import accept_batch
from ..workers.executing.context import get_current_backend_tag, get_current_replica_tag
from ..workers.executing.request import Request
from .client import Client
from .config import AutoscalingConfig, BackendConfig, HTTPOptions
from .controller.controller import ControllerActor
from .lifecycle import connect, start

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
