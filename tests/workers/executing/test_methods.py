"""Methods of a backend's class that callers can call by name."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import pytest
import wrapt
from starlette.datastructures import State
from starlette.routing import Router

from penstock.workers.executing.methods import methods_callable_from_outside
from penstock.workers.executing.request import Request
from tests.workers import running
from tests.workers.requests import backend_error_of, from_handle, from_http
from tests.workers.running import Start, double


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return "wrapped " + function(*args)

    return wrapper


class Meta(type):
    def of_the_metaclass(cls) -> str:
        return "metaclass"


class Base:
    def inherited(self, request: Request) -> str:
        return "inherited"

    def hidden(self, request: Request) -> str:
        return "hidden"


class Model:
    def __call__(self, request: Request) -> str:
        return "a model"


class Author(Base, metaclass=Meta):
    model = Model()
    tool = print
    beside = double
    cached_beside = functools.lru_cache(double)
    bound = Model().__call__
    builtin = str.upper
    Inner = Model
    alias = functools.partial(double)
    hidden: Any = None

    def __init__(self) -> None:
        self.on_the_instance = double

    def __call__(self, request: Request) -> str:
        return "called"

    def __getattr__(self, name: str) -> Any:
        if name == "made_up":
            return double
        raise AttributeError(name)

    def plain(self, request: Request) -> str:
        return "plain"

    async def waits(self, request: Request) -> str:
        await asyncio.sleep(0)
        return "waits"

    @staticmethod
    def static(request: Request) -> str:
        return "static"

    explicit = staticmethod(double)

    @classmethod
    def of_class(cls, request: Request) -> str:
        return f"of {cls.__name__}"

    @decorated
    def wrapped(self, request: Request) -> str:
        return "method"

    @functools.lru_cache  # noqa: B019 - the class of a test
    def cached(self, request: Request) -> str:
        return "cached"

    @wrapt.decorator
    def _shout(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> str:  # noqa: N805
        return str(wrapped(*args, **kwargs)).upper()

    @_shout
    def loud(self, request: Request) -> str:
        return "loud"

    def _two(self, word: str, request: Request) -> str:
        return word

    partly = functools.partialmethod(_two, "partly")

    @functools.singledispatchmethod
    def dispatched(self, request: Any) -> str:
        return "dispatched"

    @property
    def prop(self) -> Any:
        return double

    @functools.cached_property
    def cached_prop(self) -> Any:
        return double


CALLABLE = {
    "__call__": "called",
    "plain": "plain",
    "waits": "waits",
    "inherited": "inherited",
    "static": "static",
    "explicit": "twotwo",
    "of_class": "of Author",
    "wrapped": "wrapped method",
    "cached": "cached",
    "loud": "LOUD",
    "partly": "partly",
    "dispatched": "dispatched",
}


@pytest.mark.parametrize("name", CALLABLE)
async def test_methods_that_the_author_wrote_can_be_called(start: Start, name: str) -> None:
    assert await (await start("tests.workers.executing.test_methods:Author")).ask("two", call=name) == CALLABLE[name]


@pytest.mark.parametrize(
    "name",
    [
        *("mro", "of_the_metaclass", "register", "__subclasses__"),
        *("model", "tool", "beside", "cached_beside", "bound", "builtin", "Inner", "hidden", "prop", "cached_prop"),
        *("on_the_instance", "made_up", "__init__", "__getattr__", "_two", "__class__", "with.dot", ""),
    ],
)
async def test_nothing_else_can_be_called_and_the_replica_keeps_serving(start: Start, name: str) -> None:
    replica = await start("tests.workers.executing.test_methods:Author")
    reply = await replica.call(from_http(call=name))
    assert reply.status == (400 if name.startswith("_") else 404)
    assert repr(name) in backend_error_of(reply).message
    assert await replica.ask() == "called"


def test_the_callable_methods_are_listed() -> None:
    assert methods_callable_from_outside(Author) == ["__call__", *sorted(CALLABLE.keys() - {"__call__", "alias"})]


class OfDict(dict[str, Any]):
    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


class OfUserDict(UserDict[str, Any]):
    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


class OfException(Exception):
    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


class OfEnum(Enum):
    ONE = 1

    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


class OfTuple(NamedTuple):
    x: int = 1

    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


@dataclasses.dataclass
class OfDataclass:
    hook: Callable[..., Any] = double
    other_hook: Callable[..., Any] = lambda *args: "hook"

    def __call__(self, request: Request) -> str:
        return "called"

    def lookup(self, request: Request) -> str:
        return "looked up"


class OfLibrary(Router):
    def lookup(self, request: Request) -> str:
        return "looked up"


@pytest.mark.parametrize("cls", [OfDict, OfUserDict, OfException, OfEnum, OfTuple, OfDataclass, OfLibrary])
def test_methods_of_a_base_from_python_or_a_library_cannot_be_called(cls: type) -> None:
    assert methods_callable_from_outside(cls) == ["__call__", "lookup"]


def test_a_class_from_a_library_has_the_methods_of_that_library() -> None:
    assert "mount" in methods_callable_from_outside(Router)
    assert methods_callable_from_outside(State) == ["__call__"]


def test_methods_of_a_base_in_another_module_of_the_author_can_be_called() -> None:
    class Counting(running.Counter):
        pass

    assert methods_callable_from_outside(Counting) == ["__call__", "peek", "static"]


class Raising:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self) -> None: ...

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is not None:
            raise self.error


class Broken:
    attribute = Raising(AttributeError("no such weights"))
    leaves = Raising(SystemExit(3))
    interrupts = Raising(KeyboardInterrupt())
    cancels = Raising(asyncio.CancelledError())

    def __call__(self, request: Request) -> str:
        return "called"


@pytest.mark.parametrize("name", ["attribute", "leaves", "interrupts", "cancels"])
async def test_the_error_of_a_descriptor_is_the_reply_to_its_request(start: Start, name: str) -> None:
    replica = await start("tests.workers.executing.test_methods:Broken")
    reply = await replica.call(from_handle(call=name))
    assert reply.status == 500
    assert backend_error_of(reply).type_name.rpartition(".")[2] in (
        "AttributeError",
        "SystemExit",
        "KeyboardInterrupt",
        "CancelledError",
    )
    assert await replica.ask() == "called"
