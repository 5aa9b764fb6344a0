"""The context of user code: the tags of its backend and its replica."""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from typing import NamedTuple


class _Tags(NamedTuple):
    backend: str
    replica: str


_current: ContextVar[_Tags | None] = ContextVar("penstock_replica", default=None)

# For threads that user code starts, whose context is empty. There is one replica in a process.
_latest: _Tags | None = None


def get_current_backend_tag() -> str | None:
    """Return the tag of the backend whose code calls this function; None outside a replica."""
    tags = _current.get() or _latest
    return tags.backend if tags else None


def get_current_replica_tag() -> str | None:
    """Return the tag of the replica that calls this function, as log lines show it; None outside a replica."""
    tags = _current.get() or _latest
    return tags.replica if tags else None


def context_of(backend: str, replica: str) -> Context:
    """Return a context in which the functions above return these tags.

    From now on, code without a context gets them too: a thread that user code starts has an empty one.
    """
    global _latest
    _latest = _Tags(backend, replica)
    context = copy_context()
    context.run(_current.set, _latest)
    return context
