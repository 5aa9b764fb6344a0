"""Dead letters of a backend for sync code: list, replay, drop."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar, cast

from ..broker.queue.dead_letters import DeadLetter, DeadLetterStream
from ..broker.queue.publisher import QueueFull
from ..broker.wire.keys import Keys
from ..runtime.notebooks import NotebookTable
from . import background_loop
from ._tracebacks import short_traceback
from .calls.call import queue_limits
from .calls.request_client import RequestClient
from .calls.shared_client import SharedClient
from .errors import BackendNotFound, BrokerFull, ConfigError, Overloaded, PenstockError

T = TypeVar("T")

_ID = re.compile(r"\d{1,20}-\d{1,20}")


class DeadLetters(NotebookTable):
    """The dead letters of a backend: requests that were given up, with the history of their deliveries.

    Made by ``dead_letters(tag)`` of a `Connection` or a ``Client``. ``len()`` counts them, and iterating gives them as
    they are now, oldest first. All methods block, and raise `BrokerUnavailable` if Redis cannot be reached.
    """

    def __init__(self, redis_url: str, instance: str, tag: str) -> None:
        self._url, self._keys, self.tag = redis_url, Keys(instance), tag

    def __repr__(self) -> str:
        return f"DeadLetters({self.tag!r}, instance={self._keys.instance!r})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"backend": self.tag, "instance": self._keys.instance}

    @short_traceback
    def __len__(self) -> int:
        return background_loop.run(self._with_stream(lambda stream: stream.count()))

    @short_traceback
    def __iter__(self) -> Iterator[DeadLetter]:
        async def read_all(stream: DeadLetterStream) -> list[DeadLetter]:
            return [letter async for letter in stream.letters()]

        return iter(background_loop.run(self._with_stream(read_all)))

    @short_traceback
    def get(self, id_: str) -> DeadLetter:
        """Return one dead letter.

        Raises:
            TypeError, ConfigError: ``id_`` is not the id of a dead letter.
            PenstockError: no dead letter of the backend has that id.
        """
        letter = background_loop.run(self._with_stream(lambda stream: stream.get(_check_id(id_))))
        if letter is None:
            raise _not_found(self.tag, id_)
        return letter

    @short_traceback
    def body(self, letter: DeadLetter) -> bytes | None:
        """Return the body of a dead letter's request; None if it has expired or cannot be read.

        Raises:
            TypeError: ``letter`` is not a `DeadLetter`.
        """
        if not isinstance(cast(object, letter), DeadLetter):
            raise TypeError(f"letter must be a DeadLetter, as get() returns it, not {type(letter).__name__}")
        return background_loop.run(self._with_stream(lambda stream: stream.body(letter)))

    @short_traceback
    def drop(self, id_: str) -> None:
        """Delete one dead letter. Raises what `get` raises."""
        background_loop.run(self._with_client(drop_letter, id_))

    @short_traceback
    def replay(self, id_: str) -> None:
        """Queue the request of a dead letter again, and delete the dead letter.

        The request goes to the batch stream, behind interactive ones, and has no deadline. Its caller has received an
        error, so the reply goes nowhere, unless the request is an item of a batch job. A submitted request, or one with
        an idempotency key, is queued again under its id, and gets the result of this run.

        Raises:
            TypeError, ConfigError: ``id_`` is not the id of a dead letter.
            PenstockError: no dead letter of the backend has that id, or its body has expired.
            WireError: the request cannot be read.
            BackendNotFound: the backend was deleted.
            Overloaded: the backend's queue is full, or the broker is out of memory.
        """
        background_loop.run(self._with_client(replay_letter, id_))

    async def _with_client(self, work: Callable[[RequestClient, str, str], Coroutine[Any, Any, T]], id_: str) -> T:
        async with SharedClient.using(self._url, self._keys.instance) as client:
            return await work(client, self.tag, id_)

    async def _with_stream(self, work: Callable[[DeadLetterStream], Coroutine[Any, Any, T]]) -> T:
        async with SharedClient.using(self._url, self._keys.instance) as client:
            return await work(client.dead_letter_stream(self.tag))


async def drop_letter(client: RequestClient, tag: str, id_: str) -> None:
    """Delete one dead letter of the backend ``tag``; see `DeadLetters.drop`."""
    if not await client.dead_letter_stream(tag).drop(_check_id(id_)):
        raise _not_found(tag, id_)


async def replay_letter(client: RequestClient, tag: str, id_: str) -> None:
    """Queue the request of a dead letter of the backend ``tag`` again; see `DeadLetters.replay`."""
    _check_id(id_)
    snapshot = await client.registry.snapshot()
    if tag not in snapshot.backends:
        raise BackendNotFound(tag, snapshot.backends)
    limits = queue_limits(snapshot.backends[tag], batch=True)
    stream = client.dead_letter_stream(tag)
    letter = await stream.get(id_)
    try:
        result = None if letter is None else await stream.replay(letter, limits.requests, limits.bytes)
    except BrokerFull:
        raise Overloaded(tag, 0, limits.requests) from None
    if letter is None or result is None:
        raise _not_found(tag, id_)
    if isinstance(result, QueueFull):
        if result.in_bytes:
            size_bytes = 0 if letter.entry is None else letter.entry.size_bytes
            raise Overloaded(tag, result.depth, limits.bytes, result.retry_after_s, size_bytes)
        raise Overloaded(tag, result.depth, limits.requests)


def _not_found(tag: str, id_: str) -> PenstockError:
    return PenstockError(f"backend {tag!r} has no dead letter {id_!r}")


def _check_id(id_: object) -> str:
    """Return ``id_`` if it has the form of a stream entry's id, two integers of 64 bits."""
    if not isinstance(id_, str):
        raise TypeError(f"a dead letter's id must be a str, not {type(id_).__name__}")
    if _ID.fullmatch(id_) is None or max(map(int, id_.split("-"))) >= 2**64:
        raise ConfigError(f"{id_!r} is not the id of a dead letter, such as '1700000000000-0'")
    return id_
