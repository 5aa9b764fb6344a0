"""The context of user code: the tags of its backend and its replica."""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from typing import NamedTuple


class _Replica(NamedTuple):
    backend: str
    replica: str


_current: ContextVar[_Replica | None] = ContextVar("penstock_replica", default=None)

# A thread that the user's code starts has an empty context, but there is one replica in its process.
_latest: _Replica | None = None


def get_current_backend_tag() -> str | None:
    """Return the tag of the backend whose code calls this; None outside of a replica."""
    here = _current.get() or _latest
    return here.backend if here else None


def get_current_replica_tag() -> str | None:
    """Return the tag of the replica that calls this, as it stands in logs; None outside of one."""
    here = _current.get() or _latest
    return here.replica if here else None


def context_of(backend: str, replica: str) -> Context:
    """Return a context in which code knows that it runs in ``replica``, as does code without one from here on."""
    global _latest
    _latest = _Replica(backend, replica)
    context = copy_context()
    context.run(_current.set, _latest)
    return context
