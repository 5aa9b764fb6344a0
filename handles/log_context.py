"""Log context: the id of the request that is being processed, in every log line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import ContextVar

from ..broker.wire.call_ids import shown_id

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"

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


def name_requests() -> None:
    """Give every log record of this process a ``request_id``, for formats with ``%(request_id)s``.

    If logging is not configured, it is configured with `FORMAT`. For processes that run no program of the user's.
    """
    make = logging.getLogRecordFactory()

    def make_with_id(*args: object, **named: object) -> logging.LogRecord:
        record = make(*args, **named)
        record.request_id = request_ids()
        return record

    logging.setLogRecordFactory(make_with_id)
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)
