"""Short tracebacks: the error of a public function shows the line that called it, not the frames of a validation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .errors import PenstockError

P = ParamSpec("P")
T = TypeVar("T")


def short_traceback(function: Callable[P, T]) -> Callable[P, T]:
    """Raise the ``TypeError`` and `PenstockError` exceptions of a public function without the frames below it.

    Their messages name the argument or the situation. Other exceptions keep their whole traceback.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (TypeError, PenstockError) as e:
            raise e.with_traceback(None)  # noqa: B904 - it is the same exception

    return call
