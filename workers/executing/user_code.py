"""User code: a function, or an instance of a class with its methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from ..asgi.application import AsgiApplication, check_application, is_application
from ..import_paths import import_object
from ..pickling import dumps, loads
from .accept_batch import accepts_batch, marks, put_marks
from .methods import CALL, has_method, is_callable_from_outside, is_public, methods_callable_from_outside

_ASGI = "asgi"
"""Marks a deployed ASGI application: the target is this and the application, or its import path."""


class NotCallable(Exception):
    """A method that callers may not call, or that the backend does not have. ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Method(NamedTuple):
    """A method of a backend, as the runner calls it."""

    function: Callable[..., Any]
    is_async: bool
    accepts_batch: bool


class LoadedCode(NamedTuple):
    """The deployed function, or class with its arguments, not yet constructed; or the ASGI application."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def load(cls, blob: bytes) -> LoadedCode:
        """Load what `dump` returned, and import the modules that it names. Raises any error of theirs."""
        target, args, kwargs, marked = loads(blob)
        if isinstance(target, tuple):
            app: Any = cast("tuple[str, Any]", target)[1]
            app = import_object(app) if isinstance(app, str) else app
            check_application(app)
            return cls(AsgiApplication(app), (), {})
        if isinstance(target, str):
            path, target = target, import_object(target)
            if is_application(target):
                raise TypeError(f"{path} is an ASGI application: deploy it as serve.asgi({path!r})")
        if not callable(target):
            raise TypeError(f"a backend is a function or a class, not a {type(target).__name__}")
        if isinstance(target, type):
            if not any(CALL in base.__dict__ for base in target.__mro__):  # `getattr` would find ``type.__call__``
                raise TypeError(f"the class {target.__qualname__} has no __call__ method")
        elif args or kwargs:
            raise TypeError(f"{_name(target)} is not a class: there is no constructor to give arguments to")
        put_marks(target, marked)
        return cls(target, tuple(args), dict(kwargs))

    @property
    def is_async(self) -> bool:
        """Whether its ``__call__`` is ``async def``, as a coroutine function or a generator."""
        return _is_async(self.target)

    def construct(self) -> UserCode:
        """Call the constructor if it is a class. Raises any error of the constructor."""
        if isinstance(self.target, type):
            return UserCode(self.target(*self.args, **self.kwargs), has_methods=True)
        return UserCode(self.target, has_methods=False)


def dump(
    target: Callable[..., Any] | AsgiApplication | str,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> bytes:
    """Pickle a function, a class with its arguments, an ASGI application, or the import path of any of them."""
    return dumps((plain_target(target), args, dict(kwargs or {}), marks(target)))


def plain_target(target: Callable[..., Any] | AsgiApplication | str) -> Any:
    """Return the target as `dump` pickles it: an import path, also of an application, consists of plain values."""
    return (_ASGI, target.target) if isinstance(target, AsgiApplication) else target


class UserCode:
    """A function, or an object with methods, ready to be called."""

    def __init__(self, target: Callable[..., Any], *, has_methods: bool) -> None:
        self._target = target
        self._has_methods = has_methods
        self._methods: dict[str, Method] = {}
        self.call = self.method(CALL)

    def method(self, name: str) -> Method:
        """Return the method that callers call as ``name``.

        Raises:
            NotCallable: there is none (404), or callers may not call it (400).
            BaseException: a descriptor of the user's class raised it.
        """
        method = self._methods.get(name)
        if method is None:
            # Only existing methods are cached: callers can send any name.
            method = self._methods[name] = self._find(name)
        return method

    @property
    def accepts_batch(self) -> bool:
        """Whether any of its methods takes batches."""
        return any(self._accepts_batch(name) for name in self._names())

    def hook(self, name: str) -> Method | None:
        """Return the hook of that name, which Penstock calls itself; None if the class has none."""
        if not self._has_methods or not has_method(type(self._target), name):
            return None
        return _method(getattr(self._target, name))

    def __repr__(self) -> str:
        return _name(type(self._target) if self._has_methods else self._target)

    def _find(self, name: str) -> Method:
        if name == CALL:
            return _method(getattr(self._target, CALL) if self._has_methods else self._target)
        if not is_public(name):
            raise NotCallable(f"callers may not call the method {name!r}", 400)
        if not self._has_methods:
            raise NotCallable(f"{self} is a function and has no method {name!r}", 404)
        if not is_callable_from_outside(type(self._target), name):
            known = ", ".join(map(repr, self._names()))
            raise NotCallable(f"{self} has no method {name!r} that callers may call; it has {known}", 404)
        return _method(getattr(self._target, name))

    def _names(self) -> list[str]:
        return methods_callable_from_outside(type(self._target)) if self._has_methods else [CALL]

    def _accepts_batch(self, name: str) -> bool:
        try:
            return self.method(name).accepts_batch
        except Exception:  # a descriptor raises: so does every call of the method, and that is its reply
            return False


def _method(function: Callable[..., Any]) -> Method:
    if not _is_async(function):
        return Method(function, False, accepts_batch(function))
    if _is_any(function, inspect.iscoroutinefunction):
        return Method(function, True, accepts_batch(function))

    async def generate(argument: Any) -> Any:
        return function(argument)  # a generator that has not started

    return Method(generate, True, accepts_batch(function))


def _is_async(function: Callable[..., Any]) -> bool:
    return _is_any(function, inspect.iscoroutinefunction) or _is_any(function, inspect.isasyncgenfunction)


def _is_any(function: Callable[..., Any], kind: Callable[[Any], bool]) -> bool:
    # The second is for an object, or a class, with `async def __call__`.
    return kind(function) or kind(getattr(function, CALL))


def _name(target: object) -> str:
    return getattr(target, "__qualname__", None) or type(target).__qualname__
