"""Values of replies, and whole HTTP responses as a handle returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...broker.wire._fields import Pairs
from ...broker.wire.kept import Result
from ...broker.wire.replies import Reply
from ...runtime.notebooks import NotebookTable
from ..calls.call import CallOutcome
from ..calls.incoming_stream import IncomingStream
from ..codec import decode, load_json
from ..errors import WireError, from_wire

_SHOWN_BYTES = 60
"""The most bytes of a body that a ``repr`` shows."""


@dataclass(frozen=True, slots=True, repr=False)
class Response(NotebookTable):
    """An HTTP response as a value: the result of a call whose backend returned a Starlette ``Response``."""

    status_code: int
    """Status of the response, such as 200. A status of 400 or more raises nothing."""
    headers: dict[str, str]
    """Headers by lower-case name. Of a header that occurs twice, such as ``set-cookie``, it holds the last value."""
    body: bytes
    """The whole body."""
    raw_headers: Pairs
    """All headers in their order, as pairs of name and value."""

    def json(self) -> Any:
        """Return the value of a JSON body.

        Raises:
            MalformedBody: the body is not JSON.
        """
        return load_json(self.body, "the response")

    def __repr__(self) -> str:
        return f"Response(status_code={self.status_code}, headers={self.headers}, body={self._shown_body()})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"status_code": self.status_code, "headers": self.headers, "body": self._shown_body()}

    def _shown_body(self) -> str:
        body = f"{self.body[:_SHOWN_BYTES]!r}"
        return body if len(self.body) <= _SHOWN_BYTES else f"<{len(self.body):,} bytes, {body}...>"


def value_of(reply: Reply) -> Any:
    """Return the value that a backend returned.

    A pickled value is unpickled: the reply receiver passes on only those that the `PicklePolicy` allows.

    Raises:
        PenstockError: the error that the reply carries.
        MalformedBody: the body cannot be decoded.
    """
    if reply.error is not None:
        raise from_wire(reply.error)
    if reply.codec == "response":
        headers = {name.lower(): value for name, value in reply.headers}
        return Response(reply.status, headers, reply.body, reply.headers)
    return decode(reply.codec, reply.body, allow_pickle=True)


def value_of_result(result: Result) -> Any:
    """Return the value of a kept result, or raise the error that it holds.

    Pickled values are loaded: `KeptRequests` lets through only those of backends that allow it.
    """
    if result.reply.error is not None or result.reply.codec != "stream":
        return value_of(result.reply)
    values: list[Any] = []
    start, begun = 0, b""
    for codec, size, more in result.pieces:
        begun += result.reply.body[start : start + size]
        start += size
        if not more:
            values.append(decode(codec, begun, allow_pickle=True))
            begun = b""
    return values


def result_of(outcome: CallOutcome) -> Any:
    """Return the value of a call that did not request a streamed reply.

    Raises:
        WireError: the reply is streamed nevertheless.
        PenstockError: the error of the call, or the one that its reply carries.
    """
    if isinstance(outcome, Reply):
        return value_of(outcome)
    if isinstance(outcome, IncomingStream):
        outcome.close()
        raise WireError(f"the reply to request {outcome.shown_id!r} is streamed, which the call did not request")
    raise outcome
