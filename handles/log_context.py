"""Log context: the requests that are being processed, for the id in every log line and the trace of further calls."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from ..broker.wire._fields import Pairs
from ..runtime import logs


class Work(Protocol):
    """A request that is being processed, such as an `Entry`."""

    @property
    def shown_id(self) -> str:
        """Its id for logs and messages."""
        ...

    @property
    def headers(self) -> Pairs:
        """Its header fields."""
        ...


class NamedWork(NamedTuple):
    """A request of which only the id is known."""

    shown_id: str
    headers: Pairs = []  # noqa: RUF012 - nothing changes it


_working_on: ContextVar[Sequence[Work]] = ContextVar("penstock_requests", default=())


def work_on(requests: Sequence[Work]) -> None:
    """Set the requests that the current context processes."""
    _working_on.set(requests)


def current_work() -> Sequence[Work]:
    """Return the requests that the current context processes."""
    return _working_on.get()


def request_ids() -> str:
    r"""Return the ids of the current context's requests for a log line, separated by commas; ``-`` if there are none.

    >>> work_on([NamedWork("a"), NamedWork("b\n")])
    >>> request_ids()
    'a,b\\n'
    >>> work_on([])
    """
    ids = ",".join(request.shown_id for request in _working_on.get()) or "-"
    # A process that writes to Redis itself can give a request any id.
    return ids if ids.isascii() and ids.isprintable() else ascii(ids)[1:-1]


@contextmanager
def working_on(requests: Sequence[Work]) -> Generator[None]:
    """`work_on` these requests within a block."""
    token = _working_on.set(requests)
    try:
        yield
    finally:
        _working_on.reset(token)


def set_up_logs(**fields: str) -> None:
    """Configure the logging of this process, and give every log record a ``request_id``.

    For processes that run no program of the user's; `runtime.logs` has the formats.

    Args:
        **fields: what every line in JSON contains, such as ``replica``.
    """
    make = logging.getLogRecordFactory()

    def make_with_id(*args: object, **named: object) -> logging.LogRecord:
        record = make(*args, **named)
        record.request_id = request_ids()
        return record

    logging.setLogRecordFactory(make_with_id)
    logs.set_up_logs(fields)
