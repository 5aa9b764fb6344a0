"""Validation of arguments before anything is written: pure functions that return valid values or raise.

A wrong type is a ``TypeError``, a wrong value a `ConfigError`, an unknown name a `BackendNotFound`. Routes are
validated in ``proxy/routing.py``, which matches them.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ..broker.embedded.server import LEAST_MEMORY_BYTES
from ..broker.errors import ConfigError
from ..broker.transport.url import MAX_MEMORY, shown_url
from ..broker.wire.keys import check_name
from ..handles.errors import BackendNotFound
from ..handles.options import check_method_name
from ..workers.asgi.application import AsgiApplication, is_application
from ..workers.executing.accept_batch import accepts_batch
from ..workers.executing.methods import HOOKS
from ..workers.import_paths import check_import_path
from ..workers.retry import check_names
from ..workers.runtime_env import EXCLUDES, PY_MODULES, WORKING_DIR
from .config import BackendConfig

ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
"""All methods that an endpoint can have."""

WEIGHT_TOLERANCE = 1e-6

_REGISTRY = "registry"

# The options by which Ray schedules an actor. The controller sets all others, such as name, lifetime and restarts.
_RESOURCE_OPTIONS = ("num_cpus", "num_gpus", "memory")
_ACTOR_OPTIONS = (*_RESOURCE_OPTIONS, "resources", "accelerator_type")


def check_tag(tag: object) -> str:
    """Return the name of a backend."""
    tag = check_name("a backend", tag)
    if tag == _REGISTRY:
        raise ConfigError(f"a backend cannot be called {tag!r}: the keys of the registry have that name")
    return tag


def check_methods(methods: object) -> tuple[str, ...]:
    """Return HTTP ``methods`` in upper case, without repetitions, in the given order."""
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise TypeError(f"methods must be a list of str, not {type(methods).__name__}")
    checked: dict[str, None] = {}
    for method in cast("Iterable[object]", methods):
        if not isinstance(method, str):
            raise TypeError(f"methods must be str, not {type(method).__name__}")
        if method.upper() not in ALL_METHODS:
            raise ConfigError(f"the method {method!r} must be one of {', '.join(ALL_METHODS)}")
        checked[method.upper()] = None
    if not checked:
        raise ConfigError(f"methods must contain at least one of {', '.join(ALL_METHODS)}; it is empty")
    return tuple(checked)


def check_call_methods(call_methods: object) -> tuple[str, ...] | None:
    """Return the callable methods of an endpoint, without repetitions, in the given order; None allows all."""
    if call_methods is None:
        return None
    if isinstance(call_methods, str) or not isinstance(call_methods, Iterable):
        raise TypeError(f"call_methods must be a list of str or None, not {type(call_methods).__name__}")
    checked: dict[str, None] = {}
    for name in cast("Iterable[object]", call_methods):
        check_method_name(name)
        if name in HOOKS:
            raise ConfigError(f"call_methods cannot contain {name!r}, which only Penstock calls")
        checked[cast("str", name)] = None
    if not checked:
        raise ConfigError("call_methods must contain at least one method; it is empty")
    return tuple(checked)


def check_traffic(traffic: object, known: Iterable[str]) -> dict[str, float]:
    """Return the weights of an endpoint's backends, without those of 0."""
    if not isinstance(traffic, Mapping):
        raise TypeError(f"traffic must be a dict of weights by backend, not {type(traffic).__name__}")
    known = set(known)
    weights: dict[str, float] = {}
    for tag, weight in cast("Mapping[object, object]", traffic).items():
        if not isinstance(tag, str):
            raise TypeError(f"traffic must have backend tags (str) as keys, not {type(tag).__name__}")
        if tag not in known:
            raise BackendNotFound(tag, known)
        weights[tag] = _number(f"the weight of {tag!r}", weight)
        if weights[tag] < 0:
            raise ConfigError(f"the weight of {tag!r} must not be negative; it is {weights[tag]:g}")
    total = math.fsum(weights.values())
    if abs(total - 1) > WEIGHT_TOLERANCE:
        listed = ", ".join(f"{tag!r}: {weight:g}" for tag, weight in weights.items())
        raise ConfigError(f"the weights {{{listed}}} must sum to 1; they sum to {total:.9g}")
    return {tag: weight for tag, weight in weights.items() if weight}


def check_proportion(proportion: object) -> float:
    """Return the proportion of an endpoint's requests that a shadow backend receives: 0 to 1."""
    share = _number("proportion", proportion)
    if not 0 <= share <= 1:
        raise ConfigError(f"proportion must be 0 to 1, not {share:g}")
    return share


def check_memory(redis_url: str | None, given: object) -> int | None:
    """Return the memory limit of the embedded server in bytes; None for its default, or without such a server."""
    name, value = "max_memory_bytes", given
    if value is None:
        if redis_url is not None or not (text := os.environ.get(MAX_MEMORY)):
            return None
        name, value = MAX_MEMORY, int(text) if text.isdecimal() else text
        if isinstance(value, str):
            raise ConfigError(f"{name} must be a number of bytes, not {value!r}")
    elif redis_url is not None:
        raise ConfigError(
            f"{name} is for the embedded server, and redis_url is {shown_url(redis_url)}: leave out one of them; the "
            "maxmemory of another server is set in its own configuration"
        )
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < LEAST_MEMORY_BYTES:
        raise ConfigError(f"{name} must be at least {LEAST_MEMORY_BYTES} bytes, not {value}")
    return value


def check_actor_options(options: object) -> dict[str, Any]:
    """Return the options by which Ray schedules a replica."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"ray_actor_options must be a dict, not {type(options).__name__}")
    checked: dict[str, Any] = {}
    for name, value in cast("Mapping[object, Any]", options).items():
        if name not in _ACTOR_OPTIONS:
            raise ConfigError(f"ray_actor_options may hold {', '.join(_ACTOR_OPTIONS)}, not {name!r}")
        assert isinstance(name, str)
        if value is None:
            continue  # Ray takes None as not given.
        if name == "accelerator_type":
            if not isinstance(value, str):
                raise TypeError(f"accelerator_type must be a str, not {type(value).__name__}")
            checked[name] = value
        elif name == "resources":
            if not isinstance(value, Mapping):
                raise TypeError(f"resources must be a dict of amounts by name, not {type(value).__name__}")
            checked[name] = {
                _resource_name(key): _amount(f"the resource {key!r}", amount)
                for key, amount in cast("Mapping[object, object]", value).items()
            }
        else:
            checked[name] = _amount(name, value)
    return checked


def check_runtime_env(runtime_env: object) -> dict[str, Any] | None:
    """Return ``runtime_env``, with its directories checked. Ray checks the rest when the first replica starts."""
    if runtime_env is None:
        return None
    if not isinstance(runtime_env, Mapping):
        raise TypeError(f"runtime_env must be a dict, not {type(runtime_env).__name__}")
    checked = dict(cast("Mapping[str, Any]", runtime_env))
    if checked.get(WORKING_DIR) is not None:
        checked[WORKING_DIR] = _path(f"{WORKING_DIR} of runtime_env", checked[WORKING_DIR])
    for name in (PY_MODULES, EXCLUDES):
        if checked.get(name) is not None:
            if not isinstance(checked[name], list | tuple):
                raise TypeError(f"{name} of runtime_env must be a list, not {type(checked[name]).__name__}")
            checked[name] = [_path(f"{name} of runtime_env", value) for value in checked[name]]
    return checked


def check_callable(
    func_or_class: object, init_args: tuple[Any, ...], init_kwargs: Mapping[str, Any], *, takes_batch: bool
) -> None:
    """Check that the code is a function of one request, a class whose instances are such, an ASGI application or an
    import path.

    Code behind an import path is checked by the replicas, which can import it.

    Args:
        func_or_class: the code.
        init_args: arguments of the class's constructor.
        init_kwargs: keyword arguments of the class's constructor.
        takes_batch: whether it was marked with ``accept_batch``, for error messages.
    """
    takes = "one list of requests" if takes_batch else "one request"
    if isinstance(func_or_class, str):
        check_import_path(func_or_class)
        return
    if isinstance(func_or_class, AsgiApplication):
        if init_args or init_kwargs:
            raise TypeError("only a class is constructed with arguments; an ASGI application is called as it is")
        return
    if is_application(func_or_class):
        raise TypeError("an ASGI application is deployed as serve.asgi(app)")
    if isinstance(func_or_class, type):
        name = func_or_class.__qualname__
        call = _call_of(func_or_class)
        if call is None:
            raise TypeError(f"the class {name} must have a method __call__ that takes {takes}")
        _check_binds(func_or_class, f"the constructor of {name}", init_args, init_kwargs)
        _check_takes_one(call, f"{name}.__call__", takes)
        return
    if not (inspect.isroutine(func_or_class) or isinstance(func_or_class, functools.partial)):
        raise TypeError(
            "a backend must be a function, a class, serve.asgi(app) or an import path 'module:Name', not "
            f"{type(func_or_class).__name__}"
        )
    function = cast("Callable[..., Any]", func_or_class)
    name = getattr(function, "__qualname__", repr(function))
    if init_args or init_kwargs:
        raise TypeError(f"only a class is constructed with arguments; {name} is a function, which has none")
    _check_takes_one(function, name, takes)


def may_take_batches(func_or_class: object) -> bool:
    """Return whether the code may accept batches."""
    # An import path is checked by the replicas, which can import it.
    return isinstance(func_or_class, str) or accepts_batch(func_or_class)


def check_fits(config: BackendConfig, func_or_class: object, *, takes_batch: bool) -> None:
    """Check that the code supports the configuration."""
    if isinstance(func_or_class, str):
        return
    if config.retry is not None:
        check_names(config.retry.on, may_be_elsewhere=True)
    if isinstance(func_or_class, AsgiApplication):
        for field in ("max_batch_size", "user_config"):
            if (value := getattr(config, field)) is not None:
                raise ConfigError(f"{field} is {value!r}, and an ASGI application has no use for it: leave it out")
        return
    name = getattr(func_or_class, "__qualname__", repr(func_or_class))
    check_batch_size(config, name, takes_batch=takes_batch)
    if config.user_config is not None and not callable(getattr(func_or_class, "reconfigure", None)):
        raise ConfigError(f"user_config is given, but {name} has no method reconfigure that receives it")


def check_batch_size(config: BackendConfig, name: str, *, takes_batch: bool) -> None:
    """Check that ``max_batch_size`` is only given for code that accepts batches."""
    if config.max_batch_size is not None and not takes_batch:
        raise ConfigError(
            f"max_batch_size is {config.max_batch_size}, but {name} takes one request: mark it with @serve.accept_batch"
        )


def _call_of(cls: type) -> Callable[..., Any] | None:
    """Return ``__call__`` of the class's instances. ``cls.__call__`` may be that of its metaclass instead."""
    for base in cls.__mro__:
        if (call := base.__dict__.get("__call__")) is not None:
            return cast("Callable[..., Any]", call.__get__(object(), cls) if hasattr(call, "__get__") else call)
    return None


def _check_takes_one(function: Callable[..., Any], name: str, takes: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # Some builtins have no signature.
    try:
        signature.bind(None)
    except TypeError as e:
        raise TypeError(f"{name} must take {takes}; its signature is {signature} ({e})") from None


def _check_binds(cls: type, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(cls)
    except ValueError:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as e:
        raise TypeError(f"{name} does not accept the given arguments: {e}; its signature is {signature}") from None


def _path(name: str, value: object) -> str:
    if not isinstance(value, str | Path):
        raise TypeError(f"{name} must be a str or a Path, not {type(value).__name__}")
    return str(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, not {value}")
    return float(value)


def _amount(name: str, value: object) -> float | int:
    amount = _number(name, value)
    if amount < 0:
        raise ConfigError(f"{name} must not be negative; it is {amount:g}")
    if name == "memory" or amount.is_integer():
        return int(amount)
    # Ray shares a GPU in fractions, but does not reserve one and a half.
    if name == "num_gpus" and amount > 1:
        raise ConfigError(f"num_gpus must be a whole number above 1, not {amount:g}")
    return amount


def _resource_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"resources must have names (str) as keys, not {type(name).__name__}")
    if name in ("CPU", "GPU", "memory"):
        raise ConfigError(f"resources must not contain {name!r}: use num_cpus, num_gpus or memory")
    return name
