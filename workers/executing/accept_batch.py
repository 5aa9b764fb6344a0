"""``accept_batch``: the decorator of code that takes several requests in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, cast

from .methods import CALL, has_method

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "_penstock_accepts_batch"


def accept_batch(function: F) -> F:
    """Let a backend take several requests in one call.

    The function, or the method of a backend's class, takes a list of 1 to ``max_batch_size`` requests and returns a
    list of as many results in the same order. A result that is an exception fails its request alone.

    >>> @accept_batch
    ... def double(requests):
    ...     return [2 * request.data for request in requests]

    Raises:
        TypeError: ``function`` is a class (decorate its ``__call__`` instead), cannot be called, or cannot be marked,
            as a built-in function or a bound method.
    """
    if isinstance(function, type):
        raise TypeError(f"accept_batch goes on the __call__ method of {function.__name__}, not on the class")
    if not callable(function):
        raise TypeError(f"accept_batch goes on a function or a method, not on a {type(function).__name__}")
    try:
        setattr(function, _MARK, True)
    except AttributeError:
        raise TypeError(
            f"accept_batch cannot mark {function!r}: decorate a function that calls it, or the method in its class"
        ) from None
    return function


def accepts_batch(target: object) -> bool:
    """Return whether ``target``, or the ``__call__`` of a class, was decorated with `accept_batch`."""
    if isinstance(target, type):
        target = getattr(target, "__call__", None)  # noqa: B004 - the function carries the mark
    while getattr(target, _MARK, False) is not True:
        if not isinstance(target, partial):
            return False
        target = target.func
    return True


def marks(target: object) -> tuple[str, ...]:
    """Return the names of the decorated methods of a class, or ``("__call__",)`` for a decorated function.

    An object that is pickled by its name loses the mark, unless it was decorated where it is defined. `put_marks`
    restores it.
    """
    if not isinstance(target, type):
        return ("__call__",) if accepts_batch(target) else ()
    names = (name for name in dir(target) if name == CALL or has_method(target, name))
    return tuple(name for name in names if accepts_batch(_method(target, name)))


def put_marks(target: object, names: Iterable[str]) -> None:
    """Mark the methods that `marks` has returned, where the mark was lost."""
    for name in names:
        function = _method(target, name) if isinstance(target, type) else target
        if not accepts_batch(function):
            setattr(function, _MARK, True)


def _method(target: type, name: str) -> Any:
    method: Any = inspect.getattr_static(target, name, None)
    return cast(Any, method).__func__ if isinstance(method, staticmethod | classmethod) else method
