"""Errors of user code as callers see them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from traceback import FrameSummary, StackSummary, TracebackException

from starlette.exceptions import HTTPException

from ...broker.wire._fields import Pairs
from ...broker.wire.exact_json import name_of
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.errors import BackendError, MalformedBody, PenstockError, to_wire
from .forms import undecoded_hint

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 8 * 1024
_LONGEST_TRACEBACK = 32 * 1024

_OWN_FOLDER = os.path.dirname(os.path.dirname(__file__)) + os.sep


def failure(error: BaseException) -> PenstockError:
    """Return the error that the caller receives when user code raised ``error``. Never raises.

    A `MalformedBody` is the caller's fault, and returned as such. A Starlette ``HTTPException`` keeps its status and
    its detail; `failed_reply` adds its headers. An error of a call to another backend keeps its status if that is 503
    or 504. All others become a 500.
    """
    # An exception is user code too: its class, its attributes and its text can raise.
    try:
        if isinstance(error, MalformedBody):
            return MalformedBody(_message(error))
    except BaseException:
        pass
    return backend_error(error)


def backend_error(error: BaseException) -> BackendError:
    """Return a `BackendError` with the type, the text and the traceback of ``error``. Never raises."""
    try:
        if isinstance(error, HTTPException) and 400 <= error.status_code <= 599:
            return _described(error, _printable(str(error.detail)), int(error.status_code))
        if isinstance(error, PenstockError) and error.status in (503, 504):
            return _described(error, _message(error), error.status)
    except BaseException:  # such as an ``HTTPException`` whose status is not a number
        pass
    return _described(error, _message(error), 500)


def _described(error: BaseException, message: str, status: int) -> BackendError:
    return BackendError(_name_of_type(error), message, user_traceback(error), status)


def failed_reply(entry: Entry, error: BaseException, replica: str, run_ms: float = 0.0) -> Reply:
    """Return the reply to a request during which user code raised ``error``. Never raises."""
    shown = failure(error)
    if isinstance(shown, BackendError) and (hint := undecoded_hint(entry, error)):
        shown = BackendError(shown.type_name, shown.message + hint, shown.traceback, shown.status)
    return Reply(entry.id, shown.status, "none", _headers(error), to_wire(shown), replica, 0.0, run_ms)


def raised_reply(entry: Entry, error: BaseException, replica: str, run_ms: float = 0.0) -> Reply:
    """Return the whole reply to a request during which user code raised ``error``. Never raises.

    As in Starlette, an ``HTTPException`` with a status below 400, such as a redirect, is a response and not an error.
    """
    try:
        if isinstance(error, HTTPException) and 200 <= error.status_code < 400:
            return _response(entry, error, replica, run_ms)
    except BaseException:
        pass
    return failed_reply(entry, error, replica, run_ms)


def _response(entry: Entry, raised: HTTPException, replica: str, run_ms: float) -> Reply:
    headers, body = _headers(raised), b""
    if raised.status_code not in (204, 304):  # RFC 9110, section 6.4.1: these have no content
        body = _printable(str(raised.detail)).encode()
        if all(name != "content-type" for name, _ in headers):
            headers.append(("content-type", "text/plain; charset=utf-8"))
    return Reply(entry.id, int(raised.status_code), "response", headers, None, replica, 0.0, run_ms, body)


def _headers(error: BaseException) -> Pairs:
    """Return the headers of ``error``, such as www-authenticate and location; none if they are not a mapping."""
    try:
        if isinstance(error, HTTPException):
            items = (error.headers or {}).items()
            return [(_printable(str(name)).lower(), _printable(str(value))) for name, value in items]
        if isinstance(error, PenstockError) and (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
            return [("retry-after", str(max(1, math.ceil(retry_after_s))))]
    except BaseException:
        log.warning("the headers of a %s cannot be read; its reply is sent without them", _name_of_type(error))
    return []


def user_traceback(error: BaseException) -> str:
    """Return the traceback of ``error`` as text, without the frames of Penstock and of the import system.

    It is empty if no other frames are left: the error was raised by Penstock, or never raised.
    """
    try:
        report = TracebackException.from_exception(error)
        if not _keep_user_frames(report):
            return ""
        text = "".join(report.format())
    except BaseException:  # an exception class can make even this fail
        text = f"{_name_of_type(error)}: <its traceback cannot be printed>"
    return _printable(text, _LONGEST_TRACEBACK)


def _keep_user_frames(report: TracebackException) -> bool:
    """Drop all other frames. Returns whether any frame is left."""
    # A loop and not a recursion: a chain of exceptions can be longer than Python's stack is deep.
    any_left, left, seen = False, [report], set[int]()
    while left:
        report = left.pop()
        if id(report) in seen:
            continue
        seen.add(id(report))
        report.stack = StackSummary.from_list([frame for frame in report.stack if not _is_hidden(frame)])
        any_left = any_left or bool(report.stack)
        more: Iterable[TracebackException | None] = (report.__cause__, report.__context__)
        left += [other for other in more if other is not None]
        left += getattr(report, "exceptions", None) or ()  # of an exception group (Python 3.11)
    return any_left


def _is_hidden(frame: FrameSummary) -> bool:
    return frame.filename.startswith((_OWN_FOLDER, "<frozen importlib"))


def _message(error: BaseException) -> str:
    try:
        return _printable(str(error))
    except BaseException:
        return "<its message cannot be printed>"


def _name_of_type(error: BaseException) -> str:
    try:
        return _printable(name_of(type(error)))
    except BaseException:
        return "BaseException"


def _printable(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """Return ``text`` as valid Unicode, with its middle cut out if it is too long."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
