"""What went wrong in the user's code, as its caller will see it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from traceback import FrameSummary, StackSummary, TracebackException

from starlette.exceptions import HTTPException

from ..broker.wire import Entry, Pairs, Reply
from ..handles.codec import name_of
from ..handles.errors import BackendError, MalformedBody, PenstockError, to_wire

_LONGEST_MESSAGE = 8 * 1024
_LONGEST_TRACEBACK = 32 * 1024

_OURS = os.path.dirname(__file__) + os.sep


def failure(error: BaseException) -> PenstockError:
    """Return what the caller of a request gets to see when the user's code raised ``error`` during it.

    A `MalformedBody` stays one: it is the caller's fault. A Starlette ``HTTPException`` keeps its status and detail;
    what a call to another backend raised because that was busy or late stays a 503 or 504. All else is a 500.
    """
    return MalformedBody(_message(error)) if isinstance(error, MalformedBody) else backend_error(error)


def backend_error(error: BaseException) -> BackendError:
    if isinstance(error, HTTPException) and 400 <= error.status_code <= 599:
        message, status = _printable(str(error.detail)), int(error.status_code)
    else:
        message, status = _message(error), 500
        if isinstance(error, PenstockError) and error.status in (503, 504):
            status = error.status
    return BackendError(_printable(name_of(type(error))), message, user_traceback(error), status)


def failed_reply(entry: Entry, error: BaseException, replica: str, run_ms: float = 0.0) -> Reply:
    """Return the answer to a request during which the user's code raised ``error``."""
    headers: Pairs = []
    if isinstance(error, HTTPException) and error.headers:  # such as www-authenticate
        headers = [(_printable(str(name)).lower(), _printable(str(value))) for name, value in error.headers.items()]
    told = failure(error)
    return Reply(entry.id, told.status, "none", headers, to_wire(told), replica, 0.0, run_ms)


def user_traceback(error: BaseException) -> str:
    """Return the traceback of ``error`` as text, without the frames that are ours or the import system's.

    It is empty if no other frames are left: then the error is ours, or an exception that was never raised.
    """
    try:
        report = TracebackException.from_exception(error)
        if not _keep_user_frames(report):
            return ""
        text = "".join(report.format())
    except Exception:  # an exception class can make even this fail
        text = f"{name_of(type(error))}: <its traceback cannot be printed>"
    return _printable(text, _LONGEST_TRACEBACK)


def _keep_user_frames(report: TracebackException) -> bool:
    """Drop all others. Returns whether any is left."""
    # Walked with a list, as a chain of exceptions can be longer than Python's stack is deep.
    any_left, left, seen = False, [report], set[int]()
    while left:
        report = left.pop()
        if id(report) in seen:
            continue
        seen.add(id(report))
        report.stack = StackSummary.from_list([frame for frame in report.stack if not _is_ours(frame)])
        any_left = any_left or bool(report.stack)
        more: Iterable[TracebackException | None] = (report.__cause__, report.__context__)
        left += [other for other in more if other is not None]
        left += getattr(report, "exceptions", None) or ()  # of a group, from Python 3.11 on
    return any_left


def _is_ours(frame: FrameSummary) -> bool:
    return frame.filename.startswith((_OURS, "<frozen importlib"))


def _message(error: BaseException) -> str:
    try:
        return _printable(str(error))
    except Exception:
        return "<its message cannot be printed>"


def _printable(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """Return ``text`` as it can travel: valid Unicode, and cut in the middle when it is too long."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
