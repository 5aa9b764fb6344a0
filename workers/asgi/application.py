"""ASGI applications as code to deploy, and the checks that an object is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from ..import_paths import check_import_path

_PARAMETERS = ("scope", "receive", "send")


class AsgiApplication:
    """An ASGI application to deploy; made by `asgi`."""

    __slots__ = ("target",)

    def __init__(self, target: Any) -> None:
        self.target = target
        """The application, or its import path."""

    @property
    def is_path(self) -> bool:
        """Whether the target is an import path."""
        return isinstance(self.target, str)

    def __repr__(self) -> str:
        return f"asgi({self.target!r})" if self.is_path else f"asgi(<{_name(self.target)}>)"


def asgi(application: Callable[..., Any] | str) -> AsgiApplication:
    """Make an ASGI application a backend: ``client.create_backend("api", serve.asgi(app))``.

    Args:
        application: an ASGI 3 application, such as one of FastAPI or Starlette, or its import path in the replicas,
            ``"package.module:app"``. An object is pickled: each replica has a copy. An application that is defined in
            a module of the replicas is best named by its import path, as it then is the object that the module's own
            code refers to.

    Raises:
        TypeError: the object is not an ASGI 3 application.
        ConfigError: the import path is malformed.
    """
    if isinstance(application, str):
        return AsgiApplication(check_import_path(application))
    check_application(application)
    return AsgiApplication(application)


def check_application(application: object) -> None:
    """Raise ``TypeError`` unless ``application`` can be an ASGI 3 application. Does not call it."""
    name = _name(application)
    if not callable(application):
        raise TypeError(f"an ASGI application is called with scope, receive and send; a {name} cannot be called")
    if isinstance(application, type) and not hasattr(application, "__await__"):
        raise TypeError(f"an ASGI application is an object, and {name} is a class: pass an instance of it")
    try:
        signature = inspect.signature(application)
    except ValueError:
        return  # some builtins have no signature
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise TypeError(
            f"an ASGI 3 application takes scope, receive and send; {name} has the signature {signature}"
            f"{_hint(signature)}"
        ) from None


def is_application(target: object) -> bool:
    """Return whether ``target`` is clearly an ASGI application: callable with ``(scope, receive, send)``."""
    try:
        signature = inspect.signature(cast("Callable[..., Any]", target))
    except (TypeError, ValueError):
        return False
    return tuple(signature.parameters) == _PARAMETERS


def _hint(signature: inspect.Signature) -> str:
    names = tuple(signature.parameters)
    if len(names) == 2:
        return ": a WSGI application is wrapped first, as with a2wsgi.WSGIMiddleware"
    if names == _PARAMETERS[:1]:
        return ": an ASGI 2 application is wrapped first, with asgiref.compatibility.guarantee_single_callable"
    return "" if names else ": a function that makes the application is called first"


def _name(target: object) -> str:
    return getattr(target, "__qualname__", None) or type(target).__qualname__
