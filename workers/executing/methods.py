"""Methods of a backend's class that callers may call by name.

The name comes from outside, from a header or from a handle, so only a method that the author of the class wrote may be
called:

- It is found in the MRO, where the first class that has the name decides, as in Python itself. The metaclass (``mro``),
  the instance and ``__getattr__`` are not searched.
- It is a function, a static or class method, a ``functools.partialmethod`` or ``singledispatchmethod``, or the result
  of a decorator that binds as a function does (``functools.lru_cache``, ``wrapt``, ``jax.jit``). Not methods are: a
  property, a class, another callable object such as a model, a function that was defined outside the class, and the
  default of a dataclass field.
- The class that has it was written by the author: it is not a builtin and does not come from the standard library or an
  installed library, unless the backend's own class is in the same top-level package.
- Its name is public, and is not one of the hooks that Penstock itself calls. It is no loader of models.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any, cast

CALL = "__call__"

RECONFIGURE, CHECK_HEALTH = "reconfigure", "check_health"
HOOKS = (RECONFIGURE, CHECK_HEALTH)
"""Methods that callers may not call: they could configure the backend."""

_INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Folders into which package managers put libraries."""

LOADER_MARK = "_penstock_loads_models"
"""Attribute of a loader of models (``workers/multiplexed.py``), which callers may not call."""

_EXPLICIT = (staticmethod, classmethod, functools.partialmethod, functools.singledispatchmethod)
"""Types of class attributes that always make a method."""


def is_public(name: str) -> bool:
    """Return whether callers may call a method of that name, if there is one."""
    return name == CALL or not (name.startswith("_") or name in HOOKS)


def has_method(cls: type, name: str) -> bool:
    """Return whether ``cls`` or a base of it has a method of that name, by any author. Runs no code of the class."""
    base = _owner(cls, name)
    return base is not None and _is_method(base.__dict__[name])


def is_callable_from_outside(cls: type, name: str) -> bool:
    """Return whether ``name`` is public and a method that the author of ``cls`` wrote. Runs no code of the class."""
    base = _owner(cls, name) if is_public(name) else None
    if base is None or not _is_method(found := base.__dict__[name]) or not _is_written_in(base, name, cls):
        return False
    return not (type(found) is FunctionType and LOADER_MARK in found.__dict__)


def methods_callable_from_outside(cls: type) -> list[str]:
    """Return the names of all methods that callers may call: ``__call__`` first, then in alphabetical order."""
    names = {name for base in cls.__mro__ for name in base.__dict__ if name != CALL}
    return [CALL, *sorted(name for name in names if is_callable_from_outside(cls, name))]


def _owner(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in base.__dict__), None)


def _is_method(found: object) -> bool:
    if isinstance(found, staticmethod | classmethod):
        return _is_function(cast(Any, found).__func__)
    return isinstance(found, _EXPLICIT) or _is_function(found)


def _is_function(found: object) -> bool:
    """Return whether it can be called and binds to an instance, as a function does."""
    kind = type(found)
    if kind is FunctionType:
        return True
    # The types of builtin functions, of their descriptors and of bound methods are in `builtins`.
    if isinstance(found, type) or kind.__module__ == "builtins":
        return False
    return _owner(kind, "__get__") is not None and _owner(kind, "__call__") is not None


def _is_written_in(base: type, name: str, cls: type) -> bool:
    if name in base.__dict__.get("__dataclass_fields__", ()) or not _is_of_same_author(base, cls):
        return False
    found = base.__dict__[name]
    if isinstance(found, _EXPLICIT):
        return True
    # `getattr` on anything but a function could run code of its class.
    qualname: Any = cast(Any, found).__qualname__ if type(found) is FunctionType else _static_qualname(found)
    if not isinstance(qualname, str):
        return True
    scope = qualname.rpartition(".")[0]
    return scope not in ("", base.__qualname__.rpartition(".")[0])


def _static_qualname(found: object) -> object:
    return inspect.getattr_static(found, "__qualname__", None)


def _is_of_same_author(base: type, cls: type) -> bool:
    package = base.__module__.partition(".")[0]
    if package == cls.__module__.partition(".")[0]:
        return True
    if package in sys.stdlib_module_names:
        return False
    path = getattr(sys.modules.get(base.__module__), "__file__", None) or ""
    return _INSTALLED.isdisjoint(path.replace("\\", "/").split("/"))
