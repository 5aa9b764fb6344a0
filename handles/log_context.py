"""Log context: the id of the request being processed, in every log line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import ContextVar

from ..broker.wire.call_ids import shown_id

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"

_working_on: ContextVar[Sequence[tuple[str, str]]] = ContextVar("penstock_requests", default=())


def work_on(requests: Sequence[tuple[str, str]]) -> None:
    """Name these requests in what this context logs from now on: each by its request id, or else by its call's.

    Which is shown is decided when something is logged: see `shown_id`.
    """
    _working_on.set(requests)


def request_ids() -> str:
    r"""Return what the current context works on, as it may stand in a log line: ids with commas between, or ``-``.

    >>> work_on([("a", "00ff"), ("b\n", ""), ("", "00ff")])
    >>> request_ids()
    'a,b\\n,call-8909cde2f411'
    >>> work_on([])
    """
    ids = ",".join(shown_id(*request) for request in _working_on.get()) or "-"
    # A publisher that writes to Redis itself can give a request any id.
    return ids if ids.isascii() and ids.isprintable() else ascii(ids)[1:-1]


def name_requests() -> None:
    """Give every log record of this process a ``request_id``; where nobody has set up logging, show it.

    For processes that are ours alone. A format of the user's own has it as ``%(request_id)s``.
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
