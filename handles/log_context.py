"""Log context: the id of the request that is being processed, in every log line."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from ..broker.wire.call_ids import shown_id
from ..runtime import logs

_working_on: ContextVar[Sequence[tuple[str, str]]] = ContextVar("penstock_requests", default=())


def work_on(requests: Sequence[tuple[str, str]]) -> None:
    """Set the requests that the current context processes, for its log lines.

    Args:
        requests: pairs of a request id, empty if there is none, and the id of the call. See `shown_id`, which selects
            one of the two when a line is logged.
    """
    _working_on.set(requests)


def request_ids() -> str:
    r"""Return the ids of the current context's requests for a log line, separated by commas; ``-`` if there are none.

    >>> work_on([("a", "00ff"), ("b\n", ""), ("", "00ff")])
    >>> request_ids()
    'a,b\\n,call-8909cde2f411'
    >>> work_on([])
    """
    ids = ",".join(shown_id(*request) for request in _working_on.get()) or "-"
    # A process that writes to Redis itself can give a request any id.
    return ids if ids.isascii() and ids.isprintable() else ascii(ids)[1:-1]


@contextmanager
def working_on(requests: Sequence[tuple[str, str]]) -> Generator[None]:
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
