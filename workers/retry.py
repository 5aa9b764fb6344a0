"""Retries of user code: which errors are retried, how often, and after which time.

An error is retried if its class or a base of it is named by ``RetryConfig.on``, or if it is a `Retry`. The time before
the next attempt has full jitter: it is random between 0 and a limit that doubles with each attempt, so that requests
that failed together do not come back together
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
"""

from __future__ import annotations

import difflib
import importlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from starlette.exceptions import HTTPException

from ..broker.registry.records import RetrySpec
from ..handles.errors import ConfigError, MalformedBody

MAX_AFTER_S = 24 * 3600.0
"""Longest time before an attempt that code may ask for: its request counts as queued meanwhile."""

_MAX_DOUBLINGS = 60
"""The limit of the backoff is ``max_backoff_s`` long before, whatever ``backoff_s`` is."""

_DEFAULTS = RetrySpec()

_REPLIES: tuple[type[BaseException], ...] = (HTTPException, MalformedBody)
"""Exceptions by which code replies on purpose. They are retried only if they are named, and not by a base."""


class Retry(Exception):
    """Raised by the code of a backend to have the request run again.

    It is run at most ``RetryConfig.max_attempts`` times in all (3 without a configuration), and never after its
    deadline. The caller then gets the exception from which, or during whose handling, the last ``Retry`` was raised;
    without one, the ``Retry`` itself.

    Args:
        reason: a message for the caller.
        after_s: seconds until the next attempt, at most 24 hours; None for the backoff of the configuration.

    Raises:
        TypeError: ``after_s`` is not a number.
        ConfigError: it is negative, not finite, or too long.
    """

    def __init__(self, reason: str = "the code asked to be run again", *, after_s: float | None = None) -> None:
        super().__init__(reason)
        if after_s is not None:
            if isinstance(after_s, bool) or not isinstance(cast(Any, after_s), int | float):
                raise TypeError(f"after_s must be a number of seconds, not {type(after_s).__name__}")
            if not 0 <= after_s <= MAX_AFTER_S:
                raise ConfigError(f"after_s must be 0 to {MAX_AFTER_S:g} seconds, not {after_s!r}")
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class RetryWish:
    """The wish of user code that a request is run again."""

    after_s: float | None = None
    """Seconds until then; None for the backoff of the configuration."""


class RetryPolicy:
    """The retries of one backend's configuration; without one, only `Retry` is retried."""

    def __init__(self, spec: RetrySpec | None, uniform: Callable[[float, float], float] | None = None) -> None:
        """``uniform`` returns a random number between two bounds."""
        self._spec = spec or _DEFAULTS
        self._on = frozenset(() if spec is None else spec.on)
        # An own generator: user code that seeds Python's global one would take the jitter away.
        self._uniform = uniform or random.Random().uniform
        self._is_named: WeakKeyDictionary[type[BaseException], bool] = WeakKeyDictionary()

    def wish_of(self, error: BaseException) -> RetryWish | None:
        """Return the wish that an error of user code is; None if it is not retried. Never raises."""
        kind = type(error)  # `isinstance` would also look at its ``__class__``, which is user code
        try:
            if issubclass(kind, Retry):
                return RetryWish(cast("Retry", error).after_s)
            if not self._on:
                return None
            if (is_named := self._is_named.get(kind)) is None:
                is_named = self._is_named[kind] = any(
                    _is_called(base, name) for base in _bases(kind) for name in self._on
                )
        except Exception:  # a subclass and a metaclass are user code too
            return None
        return RetryWish() if is_named else None

    def delay_s(self, attempts: int, wish: RetryWish) -> float | None:
        """Return how long to wait after so many attempts; None if no other one is allowed."""
        spec = self._spec
        if attempts >= spec.max_attempts:
            return None
        if wish.after_s is not None:
            return wish.after_s
        doubled_s = math.ldexp(spec.backoff_s, min(attempts - 1, _MAX_DOUBLINGS))
        return self._uniform(0.0, min(spec.max_backoff_s, doubled_s))


def shown_error(error: BaseException) -> BaseException:
    """Return the error that a caller gets when ``error`` is not retried any more."""
    if not issubclass(type(error), Retry):
        return error
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause or error


def check_names(names: Iterable[str], *, may_be_elsewhere: bool) -> None:
    """Check that each name is that of an exception class.

    Args:
        names: bare ones, of classes that are loaded, and qualified ones, whose modules are imported.
        may_be_elsewhere: accept a qualified name whose module cannot be imported here: replicas may have it.

    Raises:
        ConfigError: the first name that cannot be matched.
    """
    for name in names:
        if any(_is_called(kind, name) for kind in _loaded()):
            continue
        module, _, _ = name.rpartition(".")
        if not module:
            known = sorted({kind.__name__ for kind in _loaded()})
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "is it imported only when the code runs?"
            raise ConfigError(
                f"RetryConfig.on has {name!r}, and no exception class of that name is loaded; {hint} Otherwise write "
                "it with its module, such as 'httpx.TransportError'"
            )
        found = _resolved(name)
        if isinstance(found, ImportError):
            if may_be_elsewhere:
                continue
            raise ConfigError(f"RetryConfig.on has {name!r}, and its module cannot be imported: {found}")
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ConfigError(f"RetryConfig.on has {name!r}, and {module!r} has no exception class of that name")


def _bases(kind: type[BaseException]) -> Iterator[type]:
    for base in kind.__mro__:
        yield base
        if base in _REPLIES:
            return


def _is_called(kind: type, name: str) -> bool:
    """Return whether a class has a name: its bare one, or one with a module that defines or imports it."""
    if name in (kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"):
        return True
    module, _, attribute = name.rpartition(".")
    return bool(module) and getattr(sys.modules.get(module), attribute, None) is kind


def _loaded() -> Iterator[type[BaseException]]:
    """Yield every exception class of this process."""
    left, seen = [BaseException], set[type]()
    while left:
        kind = left.pop()
        if kind not in seen:
            seen.add(kind)
            if _has_names(kind):
                yield kind
            left += type.__subclasses__(kind)


def _has_names(kind: type) -> bool:
    """Return whether the names of a class can be read; its metaclass may raise."""
    try:
        return all(isinstance(name, str) for name in (kind.__name__, kind.__qualname__, kind.__module__))
    except Exception:
        return False


def _resolved(name: str) -> object:
    """Import the object of a qualified name. Returns None if its module lacks it, or the ImportError."""
    module, _, rest = name.rpartition(".")
    error: ImportError | None = None
    while module:
        try:
            found: object = importlib.import_module(module)
        except ImportError as e:
            error = error or e
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}"
            continue
        except Exception:  # the code of the module
            return None
        for attribute in rest.split("."):
            found = getattr(found, attribute, None)
        return found
    return error
