"""``multiplexed``: the decorator of a loader of models, which keeps those that requests have used last.

Each replica has a cache for each loader. A model is loaded on first use, once for all requests that wait for it. While
it is loaded it takes a place in the cache, so that there are never more than ``max_models`` loaded or loading ones,
unless requests still use those that were evicted. A failed load is not kept: the next request tries again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast, overload
from uuid import uuid4

from starlette.exceptions import HTTPException

from ..broker.errors import ConfigError
from ..handles.log_context import Work, current_work, work_on
from ..handles.options import model_id_of
from .executing.methods import LOADER_MARK

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "_penstock_models"
"""Attribute of an instance that has loaders: its caches, by the keys of the loaders."""


def get_multiplexed_model_id() -> str:
    """Return the model that the current request names; an empty string if it names none.

    A request names it by the header ``X-Serve-Model-Id``, or by ``handle.options(model_id=...)``. The requests of a
    batch may name several models, which ``request.model_id`` tells apart.

    Raises:
        RuntimeError: the requests of the current batch name different models.
    """
    named = {model_id_of(request.headers) for request in current_work()}
    if len(named) > 1:
        shown = ", ".join(sorted(map(repr, named)))
        raise RuntimeError(f"the requests of this batch name the models {shown}: use the model_id of each request")
    return named.pop() if named else ""


@overload
def multiplexed(function: F) -> F: ...
@overload
def multiplexed(*, max_models: int = 3) -> Callable[[F], F]: ...


def multiplexed(function: F | None = None, *, max_models: int = 3) -> F | Callable[[F], F]:
    """Let a function, or a method of a backend's class, load models by id, and keep the last ones of each replica.

    The decorated loader takes the id of a model and returns the model. It may be ``async def``. A call returns the
    loaded model, or loads it. Before that the model is evicted that was used longest ago; one that no request uses goes
    first. An evicted model that has a method ``close`` is closed by it, plain or ``async def``, once no request uses it
    any more; any other is left to Python, which calls its ``__del__``.

    >>> class Translator:
    ...     @multiplexed(max_models=2)
    ...     def load(self, model_id):
    ...         return {"model": model_id}
    ...
    ...     def __call__(self, request):
    ...         return self.load(get_multiplexed_model_id())

    Args:
        function: the loader, where the decorator is used without arguments.
        max_models: the most models that one replica holds.

    Raises:
        TypeError: ``max_models`` is not a number, or the loader is not a function.
        ConfigError: ``max_models`` is less than 1.
    """
    if function is None:
        return partial(_decorated, max_models=_checked_count(max_models))
    return _decorated(function, max_models=_checked_count(max_models))


def _checked_count(max_models: object) -> int:
    if isinstance(max_models, bool) or not isinstance(max_models, int):
        raise TypeError(f"max_models must be an int, not {type(max_models).__name__}")
    if max_models < 1:
        raise ConfigError(f"max_models must be at least 1, not {max_models}")
    return max_models


def _decorated(function: F, *, max_models: int) -> F:
    if not inspect.isfunction(function):
        raise TypeError(
            "multiplexed goes on a function or a method that takes the id of a model, "
            f"not on a {type(function).__name__}"
        )
    # The caches are found by this key. They cannot be in the closure, which is pickled with the code.
    key = f"{function.__qualname__} {uuid4().hex}"
    loader: Any
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def load_soon(*arguments: Any) -> Any:
            return await _cache_of(arguments, key, max_models).get_soon(arguments[-1], partial(function, *arguments))

        loader = load_soon
    else:

        @wraps(function)
        def load(*arguments: Any) -> Any:
            return _cache_of(arguments, key, max_models).get(arguments[-1], partial(function, *arguments))

        loader = load
    setattr(loader, LOADER_MARK, True)
    return cast(F, loader)


_of_functions: dict[str, ModelCache] = {}
"""Caches of loaders that are functions and not methods, by the keys of the loaders."""

_making = threading.Lock()


def _cache_of(arguments: tuple[Any, ...], key: str, max_models: int) -> ModelCache:
    """Return the cache of a loader, which belongs to the object whose method it is."""
    if len(arguments) not in (1, 2):
        raise TypeError(f"a loader is called with the id of a model, not with {len(arguments)} arguments")
    caches = _of_functions if len(arguments) == 1 else _caches_of(arguments[0])
    if (cache := caches.get(key)) is None:
        with _making:
            cache = caches.setdefault(key, ModelCache(max_models))
    return cache


def _caches_of(owner: Any) -> dict[str, ModelCache]:
    try:
        members = cast("dict[str, Any]", vars(owner))
    except TypeError:
        raise TypeError(
            f"the class {type(owner).__qualname__} has __slots__ and no __dict__, where the models of its loader are "
            "kept"
        ) from None
    caches: Any = members.get(_ATTRIBUTE)
    if caches is None:
        with _making:
            caches = members.get(_ATTRIBUTE, {})
            # A class has no `__dict__` that can be written to, and an instance of a frozen one no other place.
            if isinstance(owner, type):
                setattr(owner, _ATTRIBUTE, caches)
            else:
                members[_ATTRIBUTE] = caches
    return cast("dict[str, ModelCache]", caches)


class _Model:
    """A place in a cache: a model, or the load of one."""

    __slots__ = ("id", "is_evicted", "loading", "loop", "users")

    def __init__(self, model_id: str, loop: asyncio.AbstractEventLoop | None) -> None:
        self.id = model_id
        self.loading: Future[Any] = Future()
        """The model once it is loaded. Those that wait for it cannot cancel it."""
        self.loading.set_running_or_notify_cancel()
        self.loop = loop
        """The loop of an ``async def`` loader, on which the model is closed."""
        self.users: dict[int, weakref.ref[Work]] = {}
        """The requests that have got it, and live, by identity."""
        self.is_evicted = False


class _Place(NamedTuple):
    """The model for a request, or the steps that must come before."""

    model: _Model
    """The model; or one whose load must end before there is a place for it (`must_wait`)."""
    must_load: bool = False
    must_wait: bool = False
    evicted: _Model | None = None
    """The model that was evicted for it, to be closed before the load."""


class ModelCache:
    """The models of one loader in one replica. Any thread may use it."""

    def __init__(self, max_models: int) -> None:
        self._max_models = max_models
        # Reentrant: a weak reference reports the end of a request at any time, also on a thread that holds the lock.
        self._lock = threading.RLock()
        self._models: OrderedDict[str, _Model] = OrderedDict()
        """By id; the one that was used longest ago comes first."""
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, model_id: str, load: Callable[[], Any]) -> Any:
        """Return a model. If it is not loaded, ``load`` loads it on this thread.

        Raises:
            Exception: what ``load`` raised, here or for another caller that waited for the same load.
        """
        while True:
            place = self._find_place(model_id, None)
            model = place.model
            if place.must_wait:
                wait([model.loading])
                continue
            if place.must_load:
                if place.evicted is not None:
                    self._close(place.evicted)
                try:
                    value = load()
                except BaseException as e:
                    self._fail(model, e)
                    raise
                model.loading.set_result(value)
            return model.loading.result()

    async def get_soon(self, model_id: str, load: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return a model. If it is not loaded, ``load`` loads it in a task, which no caller's cancellation ends.

        Raises:
            Exception: what ``load`` raised.
        """
        while True:
            place = self._find_place(model_id, loop := asyncio.get_running_loop())
            if place.must_wait:
                try:
                    await asyncio.wrap_future(place.model.loading)
                except Exception:
                    pass  # it failed, and has left its place
                continue
            if place.must_load:
                self._spawn(loop, self._load_soon(place, load))
            return await asyncio.wrap_future(place.model.loading)

    def _find_place(self, model_id: str, loop: asyncio.AbstractEventLoop | None) -> _Place:
        _check_id(model_id)
        with self._lock:
            if (model := self._models.get(model_id)) is not None:
                self._models.move_to_end(model_id)
                self._add_users(model)
                return _Place(model)
            evicted = None
            if len(self._models) >= self._max_models:
                evicted = self._victim()
                if evicted is None:
                    return _Place(next(iter(self._models.values())), must_wait=True)
                del self._models[evicted.id]
                evicted.is_evicted = True
                if evicted.users:
                    evicted = None  # closed when the last of them ends
            model = self._models[model_id] = _Model(model_id, loop)
            self._add_users(model)
        return _Place(model, must_load=True, evicted=evicted)

    def _victim(self) -> _Model | None:
        """Return the loaded model that was used longest ago, if possible one without users; None if all are loading."""
        loaded = [model for model in self._models.values() if model.loading.done()]
        return next((model for model in loaded if not model.users), loaded[0] if loaded else None)

    async def _load_soon(self, place: _Place, load: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        try:
            if place.evicted is not None:
                await self._close_soon(place.evicted)
            value = await load()
        except BaseException as e:
            self._fail(place.model, e)
            if not isinstance(e, Exception):
                raise
        else:
            place.model.loading.set_result(value)

    def _fail(self, model: _Model, error: BaseException) -> None:
        with self._lock:
            del self._models[model.id]
        if isinstance(error, StopIteration):  # which no future takes
            cause, error = error, RuntimeError(f"the loader of model {model.id!r} raised StopIteration")
            error.__cause__ = cause
        model.loading.set_exception(error)

    # -- users, and closing

    def _add_users(self, model: _Model) -> None:
        for request in current_work():
            if (key := id(request)) not in model.users:
                model.users[key] = weakref.ref(request, partial(self._remove_user, model, key))

    def _remove_user(self, model: _Model, key: int, _: weakref.ref[Work]) -> None:
        with self._lock:
            model.users.pop(key, None)
            if model.users or not model.is_evicted:
                return
        if model.loop is None:
            self._close(model)
            return
        try:
            model.loop.call_soon_threadsafe(self._spawn_close, model.loop, model)
        except RuntimeError:
            log.debug("the loop of model %r is closed", model.id)

    def _spawn_close(self, loop: asyncio.AbstractEventLoop, model: _Model) -> None:
        self._spawn(loop, self._close_soon(model))

    def _close(self, model: _Model) -> None:
        try:
            if inspect.iscoroutine(done := _call_close(model)):
                done.close()
                raise TypeError("its method close is `async def`, so its loader must be as well")
        except Exception:
            log.exception("cannot close model %r", model.id)

    async def _close_soon(self, model: _Model) -> None:
        try:
            if inspect.isawaitable(done := _call_close(model)):
                await done
        except Exception:
            log.exception("cannot close model %r", model.id)

    def _spawn(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> None:
        context = copy_context()
        context.run(work_on, ())  # the task would keep the request alive, and so the model in use
        task = context.run(loop.create_task, coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _call_close(model: _Model) -> Any:
    close = getattr(model.loading.result(), "close", None)
    return close() if callable(close) else None


def _check_id(model_id: object) -> None:
    if not isinstance(model_id, str):
        raise TypeError(f"the id of a model must be a str, not {type(model_id).__name__}")
    if not model_id:
        raise HTTPException(
            400, "the request names no model: send the header X-Serve-Model-Id, or use handle.options(model_id=...)"
        )
