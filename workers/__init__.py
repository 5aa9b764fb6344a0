"""The claim, run, reply loop around user code, and the Ray actor around that."""

from .accept_batch import accept_batch, accepts_batch
from .context import get_current_backend_tag, get_current_replica_tag
from .request import Request

__all__ = ["Request", "accept_batch", "accepts_batch", "get_current_backend_tag", "get_current_replica_tag"]
