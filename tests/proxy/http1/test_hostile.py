"""Request smuggling and forged logs, on raw sockets, for each path through a proxy."""

import asyncio
import logging
import pickle
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import HTTP_CODEC
from penstock.handles.codec import decode
from penstock.handles.errors import MalformedBody
from penstock.proxy.server import Server
from penstock.workers.executing.request import Request
from tests.proxy.site import Site
from tests.proxy.test_server import connected, serving, talk

POST = b"POST /a HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

AMBIGUOUS = [
    # Ambiguous end of the body.
    POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    CHUNKED + b"content-length: 4\r\n\r\n0\r\n\r\n",
    POST + b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED),
    *(POST + b"content-length: %b\r\n\r\nx" % n for n in (b"+1", b"-1", b"0x1", b"1 1", b"1, 1", b"", b"9" * 30)),
    *(POST + b"transfer-encoding: %b\r\n\r\n0\r\n\r\n" % coding for coding in (b"xchunked", b"\x0bchunked")),
    POST + b"transfer-encoding: identity\r\n\r\n",
    POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    CHUNKED + b"transfer-encoding: identity\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    CHUNKED + b"\r\nfffffffffffffffff\r\nx",
    CHUNKED + b"\r\n-1\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"\r\n1\nx\r\n0\r\n\r\n",
    CHUNKED + b"\r\n1;a\nb\r\nx\r\n0\r\n\r\n",
    CHUNKED + b"\r\n1\r\nxy0\r\n\r\n",
    CHUNKED + b"\r\n0\r\ncontent-length: 5\r\n\r\n",
    # Ambiguous end of a line.
    b"POST /a HTTP/1.1\nhost: x\n\n",
    POST + b"x-a: 1\nx-b: 2\r\n\r\n",
    POST + b"x-a: 1\rx-b: 2\r\n\r\n",
    POST + b"x-a: 1\r\n\n",
    POST + b"x-a: 1\r\n content-length: 5\r\n\r\n",
    POST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    POST + b"x-a: 1\x002\r\n\r\n",
    POST + b"x a: 1\r\n\r\n",
    POST + b": 1\r\n\r\n",
    # Ambiguous or missing host.
    b"POST /a HTTP/1.1\r\n\r\n",
    POST + b"host: y\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]

FORGING = [
    b"GET /%1b[31m%0d%0aERROR%20forged HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /a\x1b[31m HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /a HTTP/1.1\r\nhost: x\x1b[31m\r\n\r\n",
    POST + b"x-request-id: a\x9b31m\r\n\r\n",
    POST + b"x-request-id: a\tb\r\n\r\n",
    POST + b"x-serve-call-method: \xc2\x9b31m\r\n\r\n",
    POST + b"x-serve-shard-key: \xe2\x80\xa8ERROR forged\r\n\r\n",
    POST + b"content-length: 1\x1b[31m\r\n\r\n",
    POST + b"connection: upgrade\r\nupgrade: \x9b31m\r\n\r\n",
    POST + b"transfer-encoding: \x9b31m, chunked\r\n\r\n0\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b"\x1b[31m HTTP/1.1\r\n\r\n",
    b"FO\x1bRGED /a HTTP/1.1\r\nhost: x\r\n\r\n",
]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@pytest.fixture
async def server(site: Site) -> AsyncIterator[Server]:
    await site.endpoint("/{path:path}", lambda entry: Reply(entry.id, codec="bytes", body=entry.body))
    async with serving(site) as server:
        yield server


async def test_an_ambiguous_request_is_refused_and_nothing_after_it_is_read(site: Site, server: Server) -> None:
    for sent in AMBIGUOUS:
        answered = await talk(server, sent + SMUGGLED)
        assert re.match(rb"HTTP/1\.1 (400|501) ", answered), sent
        assert answered.count(b"HTTP/1.1 ") == 1, sent
    assert not [entry for entry in site.started if entry.header.path == "/smuggled"]


async def test_a_repeated_content_length_is_refused(site: Site, server: Server) -> None:
    assert (await talk(server, POST + b"content-length: 1\r\ncontent-length: 1\r\n\r\nx")).startswith(b"HTTP/1.1 400 ")
    assert not site.started


@pytest.mark.parametrize("in_one_write", [True, False])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: %d\r\n" % len(SMUGGLED), SMUGGLED),
        (b"transfer-encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
        (b"", b""),
    ],
)
async def test_the_body_of_a_request_with_upgrade_is_not_read_as_a_request(
    site: Site, server: Server, framing: bytes, body: bytes, in_one_write: bool
) -> None:
    """After such a head the parser stops, as for another protocol, and would read later bytes as a request."""
    async with connected(server) as (reader, writer):
        head = POST + b"connection: upgrade\r\nupgrade: h2c\r\n" + framing + b"\r\n"
        for part in [head + body + SMUGGLED.replace(b"smuggled", b"next")] if in_one_write else [head, body]:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        if not in_one_write:
            writer.write(SMUGGLED.replace(b"smuggled", b"next"))
        answered = await asyncio.wait_for(reader.read(), 5)
    assert answered.count(b"HTTP/1.1 200 OK") == 2
    assert [(entry.header.path, entry.body) for entry in site.started] == [
        ("/a", SMUGGLED if body else b""),
        ("/next", b""),
    ]


async def test_many_heads_with_upgrade_in_one_read_are_many_requests(site: Site, server: Server) -> None:
    """Enough of them to exhaust Python's stack, if one were parsed inside the other."""
    head = b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    answered = await talk(server, 400 * head + SMUGGLED, timeout_s=60)
    assert answered.count(b"HTTP/1.1 200 OK") == 401


async def test_headers_named_by_any_connection_header_are_not_forwarded(site: Site, server: Server) -> None:
    headers = (
        b"connection: x-one, X-Two\r\nconnection: close\r\nx-one: 1\r\nx-two: 2\r\nx-three: 3\r\nkeep-alive: 5\r\n"
    )
    await talk(server, POST + headers + b"te: trailers\r\nproxy-authorization: x\r\n\r\n")
    assert site.started[0].header.headers == [("host", "x"), ("x-three", "3")]


async def test_a_pickle_that_came_over_http_is_never_unpickled(site: Site, server: Server) -> None:
    """Not even by a backend with ``allow_pickle``: no header of a client selects the codec."""
    bomb = pickle.dumps(_Bomb())
    headers = dict.fromkeys(("content-encoding", "x-codec", "codec", "x-serve-codec", "accept"), "pickle")
    headers |= {"content-type": "application/x-python-pickle", "x-serve-call-method": "pickle"}
    async with httpx.AsyncClient() as http:
        for name, value in headers.items():
            url = f"http://127.0.0.1:{server.port}/a?codec=pickle"
            assert (await http.post(url, content=bomb, headers={name: value})).content == bomb
    assert len(site.started) == len(headers)
    for entry in site.started:
        assert entry.header.codec == HTTP_CODEC
        assert Request(entry, allow_pickle=True).data == bomb
    # The pickle would raise if it were unpickled.
    with pytest.raises(MalformedBody, match="cannot be unpickled: it went off"):
        decode("pickle", bomb, allow_pickle=True)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return _explode, ()


def _explode() -> None:
    raise AssertionError("it went off")


async def test_no_request_forges_a_log_line_or_a_metric(
    site: Site, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for sent in FORGING:
        answered = await talk(server, sent.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert answered.startswith(b"HTTP/1.1 "), sent
        head, _, body = answered.partition(b"\r\n\r\n")
        assert not CONTROL.search(head.decode("latin-1").replace("\r\n", "")), sent
        assert b"\x1b" not in body, sent
    assert not [record for record in caplog.records if CONTROL.search(record.getMessage())]
    assert set(re.findall(r'endpoint="([^"]*)"', site.app.metrics.render())) <= {"", "e"}
