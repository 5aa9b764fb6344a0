"""Marking code that takes many requests at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

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
        TypeError: it is a class (its ``__call__`` is what to decorate), or cannot be called at all.
    """
    if isinstance(function, type):
        raise TypeError(f"accept_batch goes on the __call__ method of {function.__name__}, not on the class")
    if not callable(function):
        raise TypeError(f"accept_batch goes on a function or a method, not on a {type(function).__name__}")
    setattr(function, _MARK, True)
    return function


def accepts_batch(target: object) -> bool:
    """Return whether ``target``, or the ``__call__`` of a class, was decorated with `accept_batch`."""
    if isinstance(target, type):
        target = getattr(target, "__call__", None)  # noqa: B004 - it is the function that carries the mark
    while isinstance(target, partial):
        target = target.func
    return getattr(target, _MARK, False) is True
