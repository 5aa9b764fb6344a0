"""Framing of requests: heads, hosts, chunks and trailers, at their limits and beyond."""

import asyncio
import re

import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from penstock.proxy.http1 import framing
from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server
from tests.proxy.http1.raw_http import RawResponse, responses
from tests.proxy.site import Site, running, text
from tests.proxy.test_server import connected, serving, talk
from tests.support.waiting import wait_until_async

GET = b"GET /a HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"


async def one_response(server: Server, sent: bytes) -> RawResponse:
    (one,) = responses(await talk(server, sent))
    assert one.headers["connection"] == "close"
    return one


class TestTrailers:
    async def test_trailers_never_become_headers(self, site: Site) -> None:
        await site.endpoint("/a")
        names = ["x-serve-call-method", "x-serve-shard-key", "x-request-id", "x-user", "authorization", "content-type"]
        names += ["cookie", "host", "expect", "prefer", "idempotency-key", "traceparent", "te"]
        async with serving(site) as server:
            for name in names:
                sent = CHUNKED + CLOSE + b"\r\n5\r\nhello\r\n0\r\n%b: admin\r\n\r\n" % name.encode()
                one = await one_response(server, sent)
                assert (one.status, b"admin" in one.body) == (200, False), name
        assert len(site.started) == len(names)
        for entry in site.started:
            assert (entry.body, entry.header.call) == (b"hello", "__call__")
            assert {name for name, _ in entry.header.headers} == {"host"}

    @pytest.mark.parametrize("field", [b"content-length: 5", b"transfer-encoding: chunked"])
    async def test_a_trailer_with_framing_is_refused(self, site: Site, field: bytes) -> None:
        await site.endpoint("/a")
        async with serving(site) as server:
            assert (await one_response(server, CHUNKED + b"\r\n0\r\n" + field + b"\r\n\r\n")).status == 400
        assert not site.started

    async def test_trailers_do_not_affect_the_next_request(self, site: Site) -> None:
        await site.endpoint("/a")
        trailers = b"connection: upgrade\r\nupgrade: h2c\r\nconnection: close\r\nexpect: 100-continue\r\n"
        async with serving(site) as server:
            answered = await talk(server, 2 * (CHUNKED + b"\r\n0\r\n" + trailers + b"\r\n") + GET + CLOSE + b"\r\n")
        assert [one.status for one in responses(answered)] == [200, 200, 200]
        assert [entry.header.method for entry in site.started] == ["POST", "POST", "GET"]

    async def test_a_connection_field_among_trailers_removes_no_header(self, site: Site) -> None:
        await site.endpoint("/a")
        async with serving(site) as server:
            await one_response(server, CHUNKED + CLOSE + b"x-user: me\r\n\r\n0\r\nconnection: x-user\r\n\r\n")
        assert ("x-user", "me") in site.started[0].header.headers

    @pytest.mark.parametrize("size", [40_000, 60_000])
    async def test_the_bytes_of_trailers_count_with_the_head(self, site: Site, size: int) -> None:
        await site.endpoint("/a", text("here"))
        head = CHUNKED + CLOSE + b"x: " + b"y" * 20_000 + b"\r\n\r\n"
        trailers = b"".join(b"x: %b\r\n" % (b"z" * 990) for _ in range(size // 1_000))
        async with serving(site) as server:
            one = await one_response(server, head + b"5\r\nhello\r\n0\r\n" + trailers + b"\r\n")
        assert (one.status, len(site.started)) == ((200, 1) if size == 40_000 else (431, 0))

    @pytest.mark.parametrize("count", [100, 200])
    async def test_the_number_of_trailers_counts_with_that_of_the_headers(self, site: Site, count: int) -> None:
        await site.endpoint("/a", text("here"))
        async with serving(site) as server:
            one = await one_response(server, CHUNKED + CLOSE + b"\r\n0\r\n" + count * b"x: y\r\n" + b"\r\n")
        assert one.status == (200 if count == 100 else 431)

    @pytest.mark.parametrize(
        "endless",
        [b"\r\n0\r\n" + b"x: %b\r\n" % (b"y" * 1000), b"\r\n0\r\nx: yyyyyyyy", b"\r\n5;x=yyyyyyyy"],
        ids=["many", "one that is long", "an extension of a chunk"],
    )
    async def test_endless_trailers_and_extensions_are_refused(self, site: Site, endless: bytes) -> None:
        await site.endpoint("/a")
        start, again = endless[: -len(b"yyyyyyyy")], endless[-len(b"yyyyyyyy") :]
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(CHUNKED + start)
            answering = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
            sent = 0
            while not answering.done() and sent < 24_000_000:
                writer.write(again * 1_000 if b"\r\n" not in again else endless[5:] * 8)
                sent += 8_000
                await writer.drain()
                await asyncio.sleep(0)
            answer = await asyncio.wait_for(answering, 20)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert sent < 24_000_000
        assert not site.started


class TestTheHead:
    @pytest.mark.parametrize("count", [framing.MAX_HEADER_FIELDS, framing.MAX_HEADER_FIELDS + 1])
    async def test_a_head_has_at_most_128_fields(self, site: Site, count: int) -> None:
        await site.endpoint("/a", text("here"))
        async with serving(site) as server:
            one = await one_response(server, GET + CLOSE + (count - 2) * b"x: y\r\n" + b"\r\n")
        assert one.status == (200 if count == 128 else 431)

    @pytest.mark.parametrize("excess", [0, 1])
    @pytest.mark.parametrize("in_pieces", [False, True])
    async def test_a_head_has_at_most_64_kib_whatever_follows_it(
        self, site: Site, excess: int, in_pieces: bool
    ) -> None:
        await site.endpoint("/a", text("here"))
        frame = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\nconnection: close\r\nx: %b\r\n\r\n"
        head = frame % (b"y" * (framing.MAX_HEAD_BYTES + excess - len(frame % b"")))
        async with serving(site) as server, connected(server) as (reader, writer):
            for start in range(0, len(head), 1_000 if in_pieces else len(head)):
                writer.write(head[start : start + (1_000 if in_pieces else len(head))])
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(bytes(100_000))
            (one,) = responses(await asyncio.wait_for(reader.read(), 20))
        assert (one.status, one.headers["connection"]) == (431 if excess else 200, "close")

    async def test_blank_lines_before_a_head_count(self, site: Site) -> None:
        async with serving(site) as server:
            assert (await one_response(server, b"\r\n" * 40_000)).status == 431

    async def test_a_head_may_arrive_byte_by_byte(self, site: Site) -> None:
        await site.endpoint("/a")
        sent = CHUNKED + CLOSE + b"\r\n2\r\n\r\n\r\n0\r\nx: y\r\n\r\n"
        async with serving(site) as server, connected(server) as (reader, writer):
            for byte in b"\r\n" + GET + b"\r\n" + sent:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            found = responses(await asyncio.wait_for(reader.read(), 30))
        assert [one.status for one in found] == [200, 200]
        assert [entry.body for entry in site.started] == [b"", b"\r\n"]

    @pytest.mark.parametrize("version", [b"2.0", b"0.9"])
    async def test_unsupported_versions_are_refused(self, site: Site, version: bytes) -> None:
        await site.endpoint("/a")
        async with serving(site) as server:
            one = await one_response(server, b"GET /a HTTP/%b\r\nhost: x\r\n\r\n" % version)
        assert (one.status, site.started) == (505, [])

    async def test_a_client_of_http_1_0_gets_no_interim_response(self, site: Site) -> None:
        await site.endpoint("/a")
        head = b"POST /a HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        async with serving(site) as server:
            assert (await one_response(server, head + b"abc")).status == 200


VALID_HOSTS = [
    b"example.com",
    b"example.com:80",
    b"EXAMPLE.com.",
    b"a_b-c~d",
    b"127.0.0.1:8000",
    b"[::1]",
    b"[::ffff:1.2.3.4]:65535",
    b"x:",
    b"%C5%82",
    b" x \t",
]
INVALID_HOSTS = [
    b"",
    b"a b",
    b"a/b",
    b"a@b",
    b"a\\b",
    b"a?b",
    b"a#b",
    b'a"b',
    b"<a>",
    b"a:b",
    b"a:-1",
    b"a:65536",
    b"a:1:2",
    b":80",
    b"::1",
    b"[::1",
    b"[::g]",
    b"[1]",
    b"[]",
    b"[::1]x",
    b"%",
    b"%zz",
    b"\xc5\x82",
    b"a,b c",
]


class TestTheHost:
    @pytest.mark.parametrize("way", ["asgi", "direct", "middlewares"])
    async def test_a_request_has_one_valid_host(self, redis_url: str, way: str) -> None:
        async with running(redis_url, way="direct" if way == "middlewares" else way) as site:
            await site.endpoint("/a", text("here"))
            if way == "middlewares":
                site.served = wrap(site.app, [Middleware(GZipMiddleware)])
            async with serving(site) as server:
                for version, lines, status in [
                    *((b"1.1", [host], 200) for host in VALID_HOSTS),
                    *((b"1.0", [host], 200) for host in VALID_HOSTS),
                    *((b"1.1", [host], 400) for host in INVALID_HOSTS),
                    *((b"1.0", [host], 400) for host in INVALID_HOSTS),
                    (b"1.1", [], 400),
                    (b"1.0", [], 200),
                    (b"1.1", [b"x", b"x"], 400),
                    (b"1.1", [b"x", b"y"], 400),
                    (b"1.0", [b"x", b"x"], 400),
                ]:
                    fields = b"".join(b"Host:%b\r\n" % host for host in lines)
                    sent = b"GET /a HTTP/%b\r\n%bConnection: close\r\n\r\n" % (version, fields)
                    assert (await one_response(server, sent)).status == status, sent

    def test_more_hosts_than_the_cache_holds_are_still_validated(self) -> None:
        for n in range(3_000):
            assert framing.is_valid_host(b"host-%d" % n)
        assert len(framing.valid_hosts) <= 1_024
        assert framing.is_valid_host(b"another")
        assert not framing.is_valid_host(b"an other")

    @pytest.mark.parametrize(
        ("target", "seen"),
        [
            (b"http://example.com/a?b=c", ("example.com", "/a", "b=c")),
            (b"HTTPS://[::1]:8000/a/d", ("[::1]:8000", "/a/d", "")),
            (b"http://example.com?b=c", ("example.com", "/", "b=c")),
            (b"http://example.com", ("example.com", "/", "")),
        ],
    )
    async def test_the_authority_of_an_absolute_target_replaces_the_host(
        self, site: Site, target: bytes, seen: tuple[str, str, str]
    ) -> None:
        await site.endpoint("/{path:path}")
        async with serving(site) as server:
            await one_response(server, b"GET %b HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n" % target)
        (header,) = [entry.header for entry in site.started]
        assert (dict(header.headers)["host"], header.path, header.query) == seen

    @pytest.mark.parametrize(
        "target",
        [
            b"http:///a",
            b"http://user@x/a",
            b"http://x:port/a",
            b"ftp://x/a",
            b"http:/a",
            b"//",
            b"x:80",
            b"/a#b",
            b"http://x/a#b",
            b"*",
        ],
    )
    async def test_other_forms_of_a_target_are_refused(self, site: Site, target: bytes) -> None:
        await site.endpoint("/a")
        async with serving(site) as server:
            one = await one_response(server, b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)
        assert one.status == (404 if target == b"//" else 400)
        assert not site.started

    async def test_an_absolute_target_needs_a_host_as_well(self, site: Site) -> None:
        async with serving(site) as server:
            for fields in (b"", b"host: x\r\nhost: x\r\n", b"host: x y\r\n"):
                sent = b"GET http://x/a HTTP/1.1\r\n%bconnection: close\r\n\r\n" % fields
                assert (await one_response(server, sent)).status == 400


async def test_a_refusal_is_json_and_one_log_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(site) as server:
        one = await one_response(server, GET + 200 * b"x: y\r\n" + b"\r\n")
    assert one.headers["content-type"] == "application/json"
    assert re.fullmatch(rb'{"error":{"type":"RequestHeaderFieldsTooLarge","message":"[^"]*128[^"]*"}}', one.body)
    assert any("128 header fields" in record.getMessage() for record in caplog.records)


async def test_a_refused_head_request_gets_no_body(site: Site) -> None:
    async with serving(site) as server:
        answered = await talk(server, b"HEAD /a HTTP/1.1\r\nhost: x\r\n" + 200 * b"x: y\r\n" + b"\r\n")
    ((status, _, body),) = responses(answered, ["HEAD"])
    assert (status, body) == (431, b"")
    assert answered.endswith(b"\r\n\r\n")


async def test_a_refused_body_ends_the_request_that_reads_it(site: Site) -> None:
    await site.endpoint("/a")
    async with serving(site) as server, connected(server) as (reader, writer):
        writer.write(b"POST /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).startswith(b"HTTP/1.1 100 ")
        writer.write(b"5\r\nhello\r\nno length\r\n")
        (one,) = responses(await asyncio.wait_for(reader.read(), 20))
        assert one.status == 400
        await wait_until_async(lambda: site.app.metrics.in_flight == 0)
    assert not site.started
