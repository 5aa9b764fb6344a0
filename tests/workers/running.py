"""Runners to test with, and code for them to run."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from starlette.exceptions import HTTPException

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.workers.claim import Claim, RunningCall
from penstock.workers.executing.accept_batch import accept_batch
from penstock.workers.executing.request import Request
from penstock.workers.executing.runner import Runner
from tests.support.waiting import wait_until_async
from tests.workers.requests import from_handle, value_of

Start = Callable[..., Awaitable["Replica"]]


class Running:
    """Entries that run, and how to cancel them."""

    def __init__(self, call: RunningCall, claims: Sequence[Claim]) -> None:
        self._call = call
        self._claims = {claim.entry.id: claim for claim in claims}

    def cancel(self, entry: Entry) -> None:
        self._call.cancel(self._claims.get(entry.id) or Claim(b"0-0", entry))


class Replica:
    """A runner, and the replies that it gave."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.replies: dict[str, Reply] = {}
        self._loop_thread = threading.get_ident()

    def run(self, *entries: Entry) -> Running:
        given_before = len(self.replies)
        claims = [Claim(b"0-0", entry) for entry in entries]
        call = self.runner.run(claims, self.done)
        assert len(self.replies) == given_before, "replied from within run()"
        return Running(call, claims)

    def done(self, claim: Claim, reply: Reply) -> None:
        id_ = claim.entry.id
        assert threading.get_ident() == self._loop_thread
        assert id_ == reply.id
        assert id_ not in self.replies, "replied twice"
        assert reply.replica == "b#1"
        reply.fields()  # it can be encoded
        self.replies[id_] = reply

    async def reply_to(self, entry: Entry) -> Reply:
        await wait_until_async(lambda: entry.id in self.replies)
        return self.replies[entry.id]

    async def call(self, entry: Entry) -> Reply:
        self.run(entry)
        return await self.reply_to(entry)

    async def ask(self, value: object = None, *, call: str = "__call__") -> Any:
        return value_of(await self.call(from_handle(value, call=call)))


def double(request: Request) -> Any:
    return 2 * request.data


async def double_async(request: Request) -> Any:
    await asyncio.sleep(0)
    return 2 * request.data


@accept_batch
def double_each(requests: Sequence[Request]) -> list[Any]:
    return [2 * request.data for request in requests]


@accept_batch
async def double_each_async(requests: Sequence[Request]) -> list[Any]:
    await asyncio.sleep(0)
    return [2 * request.data for request in requests]


class Gate:
    """Blocks code on a thread until it is opened. A pickled copy is the same gate."""

    opened: ClassVar[dict[str, threading.Event]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.opened.setdefault(name, threading.Event())

    def open(self) -> None:
        self.opened[self.name].set()

    def wait(self) -> None:
        assert self.opened[self.name].wait(10)


hooks: dict[str, Callable[[Request], Any]] = {}
"""Functions that a test shares with its backend. Local code is pickled with copies of the objects that it uses, but an
imported module is shared.
"""


def hook(name: str) -> Callable[[Request], Any]:
    return hooks[name]


def call_hook(request: Request) -> Any:
    return hook(request.data)(request)


class Counter:
    limit = 10

    class Inner:
        pass

    def __init__(self, start: int = 0, *, step: int = 1) -> None:
        self.value, self.step = start, step
        self.model = double

    def __call__(self, request: Request) -> int:
        self.value += self.step
        return self.value

    def peek(self, request: Request) -> int:
        return self.value

    @staticmethod
    def static(request: Request) -> str:
        return "static"

    @property
    def secret(self) -> Callable[[Request], str]:
        return lambda request: "secret"

    def _private(self, request: Request) -> str:
        return "private"

    def reconfigure(self, user_config: Any) -> None:
        self.step = user_config["step"]

    def check_health(self) -> None:
        if self.step < 0:
            raise RuntimeError("it runs backwards")


def fail(request: Request) -> None:
    raise {
        "value": ValueError("bad input"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "stop": StopIteration(1),
        "generator": GeneratorExit(),
        "cancelled": asyncio.CancelledError(),
        "http": HTTPException(418, "teapot"),
    }[request.data]


async def fail_async(request: Request) -> None:
    await asyncio.sleep(0)
    fail(request)


class Mixed:
    @accept_batch
    def __call__(self, requests: list[Request]) -> list[int]:
        return [len(requests)] * len(requests)

    def alone(self, request: Request) -> str:
        return "alone"

    @accept_batch
    async def on_loop(self, requests: list[Request]) -> list[int]:
        return [10 * len(requests)] * len(requests)
