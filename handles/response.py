"""Values of replies, and whole HTTP responses as a handle returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..broker.wire._fields import Pairs
from ..broker.wire.replies import Reply
from .calls.call import CallOutcome
from .calls.incoming_stream import IncomingStream
from .codec import decode, load_json
from .errors import WireError, from_wire


@dataclass(frozen=True, slots=True)
class Response:
    """A whole HTTP response, where a backend returned one."""

    status_code: int
    headers: dict[str, str]
    """Lower-case names. Of a header that was given twice, such as ``set-cookie``, the last; ``raw_headers`` has all."""
    body: bytes
    raw_headers: Pairs

    def json(self) -> Any:
        """Return what the body says. Raises `MalformedBody` if it is not JSON."""
        return load_json(self.body, "the response")


def value_of(reply: Reply) -> Any:
    """Return the value that a backend returned, or raise the error that it sent instead.

    Pickled values are read: the receiver lets through only those that the `PicklePolicy` allows.
    """
    if reply.error is not None:
        raise from_wire(reply.error)
    if reply.codec == "response":
        headers = {name.lower(): value for name, value in reply.headers}
        return Response(reply.status, headers, reply.body, reply.headers)
    return decode(reply.codec, reply.body, allow_pickle=True)


def result_of(outcome: CallOutcome) -> Any:
    """Return the value of an answer that was asked for as a whole, or raise why there is none."""
    if isinstance(outcome, Reply):
        return value_of(outcome)
    if isinstance(outcome, IncomingStream):
        outcome.close()
        raise WireError(f"the answer to request {outcome.shown_id!r} came in parts, which were not asked for")
    raise outcome
