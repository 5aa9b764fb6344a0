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

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 8 * 1024
_LONGEST_TRACEBACK = 32 * 1024

_OURS = os.path.dirname(__file__) + os.sep


def failure(error: BaseException) -> PenstockError:
    """Return what the caller of a request gets to see when the user's code raised ``error`` during it. Never raises.

    A `MalformedBody` stays one: it is the caller's fault. A Starlette ``HTTPException`` keeps its status and detail
    (the reply has its headers: see `failed_reply`); what a call to another backend raised because that was busy or late
    stays a 503 or 504. All else is a 500.
    """
    # An exception is the user's code too: its class, its attributes and its text can raise.
    try:
        if isinstance(error, MalformedBody):
            return MalformedBody(_message(error))
    except BaseException:
        pass
    return backend_error(error)


def backend_error(error: BaseException) -> BackendError:
    """Return ``error`` with its type, text and traceback. Never raises."""
    try:
        if isinstance(error, HTTPException) and 400 <= error.status_code <= 599:
            return _described(error, _printable(str(error.detail)), int(error.status_code))
        if isinstance(error, PenstockError) and error.status in (503, 504):
            return _described(error, _message(error), error.status)
    except BaseException:  # such as an ``HTTPException`` whose status is no number
        pass
    return _described(error, _message(error), 500)


def _described(error: BaseException, message: str, status: int) -> BackendError:
    return BackendError(_name_of_type(error), message, user_traceback(error), status)


def failed_reply(entry: Entry, error: BaseException, replica: str, run_ms: float = 0.0) -> Reply:
    """Return the reply to a request during which the user's code raised ``error``. Never raises."""
    told = failure(error)
    return Reply(entry.id, told.status, "none", _headers(error), to_wire(told), replica, 0.0, run_ms)


def raised_reply(entry: Entry, error: BaseException, replica: str, run_ms: float = 0.0) -> Reply:
    """Return the whole reply to a request that ended with ``error``. Never raises.

    As in Starlette, an ``HTTPException`` with a status below 400, such as a redirect, is a response and no error.
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
    """Return the headers that belong to ``error``, such as www-authenticate and location; none if they are no dict."""
    try:
        if isinstance(error, HTTPException):
            items = (error.headers or {}).items()
            return [(_printable(str(name)).lower(), _printable(str(value))) for name, value in items]
        if isinstance(error, PenstockError) and (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
            return [("retry-after", str(max(1, math.ceil(retry_after_s))))]
    except BaseException:
        log.warning("a %s has headers that cannot be read; its answer goes without them", _name_of_type(error))
    return []


def user_traceback(error: BaseException) -> str:
    """Return the traceback of ``error`` as text, without the frames that are ours or the import system's.

    It is empty if no other frames are left: then the error is ours, or an exception that was never raised.
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
    except BaseException:
        return "<its message cannot be printed>"


def _name_of_type(error: BaseException) -> str:
    try:
        return _printable(name_of(type(error)))
    except BaseException:
        return "BaseException"


def _printable(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """Return ``text`` as it can travel: valid Unicode, and cut in the middle when it is too long."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
