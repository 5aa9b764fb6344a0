"""Dead letters of a backend for synchronous code: list, replay, drop."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

from ..broker.queue.dead_letters import DeadLetter, DeadLetterStream
from ..broker.queue.publisher import QueueFull
from ..broker.wire.keys import Keys
from . import background_loop
from .calls.call import queue_limits
from .calls.shared_client import SharedClient
from .errors import BackendNotFound, BrokerFull, ConfigError, Overloaded, PenstockError

T = TypeVar("T")

_ID = re.compile(r"\d{1,20}-\d{1,20}")


class DeadLetters:
    """The requests of a backend that nobody could serve. Made by ``dead_letters(tag)`` of a client or a thin door."""

    def __init__(self, redis_url: str, instance: str, tag: str) -> None:
        self._url, self._keys, self.tag = redis_url, Keys(instance), tag

    def __len__(self) -> int:
        return background_loop.run(self._with_queue(lambda queue: queue.count()))

    def __iter__(self) -> Iterator[DeadLetter]:
        """Iterate over them as they are now, oldest first. Raises `BrokerUnavailable`."""

        async def all_(queue: DeadLetterStream) -> list[DeadLetter]:
            return [letter async for letter in queue.letters()]

        return iter(background_loop.run(self._with_queue(all_)))

    def get(self, id_: str) -> DeadLetter:
        """Return one of them.

        Raises:
            TypeError, ConfigError: ``id_`` is no id of a dead letter.
            PenstockError: there is none of that id.
        """
        letter = background_loop.run(self._with_queue(lambda queue: queue.get(_checked(id_))))
        if letter is None:
            raise self._none(id_)
        return letter

    def body(self, letter: DeadLetter) -> bytes | None:
        """Return the body of its request; None if it has expired or cannot be read.

        Raises:
            TypeError: ``letter`` is none of what iterating and `get` give.
        """
        if not isinstance(cast(object, letter), DeadLetter):
            raise TypeError(f"letter must be a DeadLetter, as get() returns it, not {type(letter).__name__}")
        return background_loop.run(self._with_queue(lambda queue: queue.body(letter)))

    def drop(self, id_: str) -> None:
        """Delete one of them. Raises as `get` does."""
        if not background_loop.run(self._with_queue(lambda queue: queue.drop(_checked(id_)))):
            raise self._none(id_)

    def replay(self, id_: str) -> None:
        """Queue its request again, behind interactive ones and without a deadline; it is no dead letter any more.

        Its caller has been told of its end: nobody waits for an answer now, unless it is an item of a batch job.

        Raises:
            TypeError, ConfigError, PenstockError: see `get`; or its body has expired.
            WireError: it cannot be read.
            BackendNotFound: the backend is no more.
            Overloaded: the backend's queue is full, or the broker is out of memory.
        """
        background_loop.run(self._replay(_checked(id_)))

    async def _replay(self, id_: str) -> None:
        async with SharedClient.using(self._url, self._keys.instance) as caller:
            snapshot = await caller.registry.snapshot()
            if self.tag not in snapshot.backends:
                raise BackendNotFound(self.tag, snapshot.backends)
            limit, limit_bytes = queue_limits(snapshot.backends[self.tag], batch=True)
            queue = caller.dead_letter_stream(self.tag)
            letter = await queue.get(id_)
            try:
                answer = None if letter is None else await queue.replay(letter, limit, limit_bytes)
            except BrokerFull:
                raise Overloaded(self.tag, 0, limit) from None
            if letter is None or answer is None:
                raise self._none(id_)
            if isinstance(answer, QueueFull):
                if answer.in_bytes:
                    size_bytes = 0 if letter.entry is None else letter.entry.size_bytes
                    raise Overloaded(self.tag, answer.depth, limit_bytes, answer.retry_after_s, size_bytes)
                raise Overloaded(self.tag, answer.depth, limit)

    async def _with_queue(self, work: Callable[[DeadLetterStream], Coroutine[Any, Any, T]]) -> T:
        async with SharedClient.using(self._url, self._keys.instance) as caller:
            return await work(caller.dead_letter_stream(self.tag))

    def _none(self, id_: str) -> PenstockError:
        return PenstockError(f"backend {self.tag!r} has no dead letter {id_!r}")


def _checked(id_: object) -> str:
    if not isinstance(id_, str):
        raise TypeError(f"a dead letter's id must be a str, not {type(id_).__name__}")
    if _ID.fullmatch(id_) is None or max(map(int, id_.split("-"))) >= 2**64:
        raise ConfigError(f"{id_!r} is no id of a dead letter, such as '1700000000000-0'")
    return id_
