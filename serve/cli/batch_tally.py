"""Counts of a running batch: lines for its results, rates, and the time that is left."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from ...broker.wire import exact_json
from ...handles import BatchResult
from ...handles.errors import BackendError
from ...handles.files.rows import Rows
from ...handles.replies.response import Response
from .options import error_of, result_line

_SHOWN_BYTES = 200
"""How much of a response with an error status is in its error line."""
_RATE_OVER_S = 10.0
"""Current rates are those of the last seconds."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The pace of a batch at one moment."""

    rows_per_s: float
    share: float | None
    """Of the input that is done, from 0 to 1; None if its size is not known."""
    left_s: float | None
    """Seconds until the end at the current pace; None if that is not known."""


class Tally:
    """Counts of the rows that are done. One thread adds; others may read."""

    def __init__(self, rows: Rows, *, resumed: int, failed: int, ok_statuses: frozenset[int]) -> None:
        """``resumed`` rows are in the output already, ``failed`` of them as errors."""
        self._rows, self.resumed, self._failed, self._ok_statuses = rows, resumed, failed, ok_statuses
        self._began_s = time.monotonic()
        self._moments = deque([(self._began_s, 0, 0.0)])
        """When, rows by then, and how much of the input was done."""
        self.results = self.errors = 0

    def line(self, result: BatchResult) -> bytes:
        """Count a result, and return its line."""
        line: dict[str, Any] = {"index": result.index}
        file, row = self._rows.place_of(result.index)
        if file is not None:
            line["file"] = os.fsencode(file).decode(errors="backslashreplace")
            if self._rows.format != "files":
                line["row"] = row
        error = result.error
        if error is None and isinstance(result.value, Response):
            error = self._bad_status(result.value)
        if error is None:
            try:
                written = exact_json.dumps({**line, **result_line(result.value)}) + b"\n"
            except TypeError as e:
                error = e
            else:
                self.results += 1
                return written
        self.errors += 1
        return exact_json.dumps({**line, "row": row, "error": error_of(error)}) + b"\n"

    def _bad_status(self, response: Response) -> Exception | None:
        """Return the error that a response is, unless its status is one of results."""
        status = response.status_code
        if status < 400 or status in self._ok_statuses:
            return None
        body = response.body[:_SHOWN_BYTES].decode(errors="replace")
        return BackendError("Response", f"the response has the status {status}: {body}", status=status)

    @property
    def rows(self) -> int:
        """Rows whose results came in this run."""
        return self.results + self.errors

    @property
    def rate(self) -> float:
        """Rows in a second, since the beginning."""
        return self.rows / max(1e-6, time.monotonic() - self._began_s)

    def pace(self) -> Pace:
        """Return the current pace. To be called from one thread, now and then."""
        now_s, rows = time.monotonic(), self.rows
        done = self._rows.read * min(1.0, (self.resumed + rows) / max(1, self._rows.count))
        while len(self._moments) > 1 and now_s - self._moments[0][0] > _RATE_OVER_S:
            self._moments.popleft()
        then_s, rows_then, done_then = self._moments[0]
        self._moments.append((now_s, rows, done))
        seconds = max(1e-6, now_s - then_s)
        total = self._rows.total
        left_s = None
        if total is not None and done > done_then:
            left_s = max(0.0, total - done) * seconds / (done - done_then)
        return Pace((rows - rows_then) / seconds, None if not total else min(1.0, done / total), left_s)

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.resumed + self.rows,
            "results": self.results,
            "errors": self.errors,
            "resumed": self.resumed,
            "resumed_errors": self._failed,
            "seconds": round(time.monotonic() - self._began_s, 3),
            "rows_per_s": round(self.rate, 1),
        }

    def __str__(self) -> str:
        failed = f", {self._failed} of them errors: --retry-errors runs these again" if self._failed else ""
        resumed = f" ({self.resumed} were done before{failed})" if self.resumed else ""
        took_s = time.monotonic() - self._began_s
        return f"{self.results} results, {self.errors} errors{resumed} in {took_s:.1f} s, {self.rate:.0f} rows/s"
