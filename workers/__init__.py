"""Replicas, which claim requests, run user code and reply, and the Ray actors around them."""

from .executing.accept_batch import accept_batch, accepts_batch
from .executing.context import get_current_backend_tag, get_current_replica_tag
from .executing.request import Request

__all__ = ["Request", "accept_batch", "accepts_batch", "get_current_backend_tag", "get_current_replica_tag"]
