"""Parser of raw HTTP/1.1 responses, strict about their framing."""

from collections.abc import Sequence
from typing import NamedTuple


class RawResponse(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers.get("x-request-id", "")


def responses(raw: bytes, methods: Sequence[str] = ()) -> list[RawResponse]:
    """Return the responses in ``raw`` to requests with ``methods``, or ``GET`` for those beyond them.

    Raises:
        ValueError: ``raw`` contains something that is not a whole response.
    """
    found: list[RawResponse] = []
    while raw:
        head, blank, raw = raw.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        if version != "HTTP/1.1" or not blank:
            raise ValueError(f"not the head of a response: {head!r}")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        body = b""
        if method != "HEAD" and headers.get("transfer-encoding") == "chunked":
            body, raw = _unchunked(raw)
        elif method != "HEAD":
            length = int(headers["content-length"])
            if len(raw) < length:
                raise ValueError(f"{len(raw)} of {length} bytes of a body")
            body, raw = raw[:length], raw[length:]
        found.append(RawResponse(int(status), headers, body))
    return found


def _unchunked(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, line_end, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        if not line_end or raw[length : length + 2] != b"\r\n":
            raise ValueError(f"not a chunk of {length} bytes: {raw[:100]!r}")
        body, raw = body + raw[:length], raw[length + 2 :]
        if length == 0:
            return body, raw
