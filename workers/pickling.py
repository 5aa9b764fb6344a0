"""Pickles of objects whose module other processes may lack, by Ray's cloudpickle.

It is imported on first use. The import of Ray takes a second, and a process that only checks its arguments, or only
calls, does not need it.
"""

from __future__ import annotations

from typing import Any, cast

from ..runtime.extras import needed


def dumps(value: object) -> bytes:
    """Pickle a value: a function, class or module of ``__main__`` by its content. Raises what its pickling raises."""
    return cast("bytes", _cloudpickle().dumps(value))


def loads(pickled: bytes) -> Any:
    """Return the value that `dumps` pickled. Raises what its unpickling raises, such as of the modules it imports."""
    return _cloudpickle().loads(pickled)


def _cloudpickle() -> Any:
    return needed("ray.cloudpickle", "pickling code")
