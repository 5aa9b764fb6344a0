"""Lines of one logger, with the request ids of the contexts that logged them."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from penstock.handles.log_context import request_ids


class Lines(logging.Handler):
    """The lines that a test logs, with the request ids of their contexts."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.ids: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.ids.append(request_ids())


@contextmanager
def logged_lines(logger: str) -> Generator[Lines]:
    """Collect the lines of ``logger``."""
    log, lines = logging.getLogger(logger), Lines()
    log.addHandler(lines)
    try:
        yield lines
    finally:
        log.removeHandler(lines)
