"""Whatever is written to streams and sockets: it is answered, logged or buried, and touches nobody else."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

from hypothesis import HealthCheck, given, settings, strategies as st
from redis import Redis

from penstock import serve
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry, Header
from tests.faults.conftest import Scale, StartClient
from tests.faults.load.backends import Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import check, serve_work
from tests.serve.backends import replicas
from tests.support.waiting import wait_until

Fields = dict[bytes, bytes]

_RATE = 40
_ANSWER_S = 20.0
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def _pairs(fields: list[bytes]) -> Fields:
    return dict(zip(fields[::2], fields[1::2], strict=True))


_ENTRY = _pairs(Entry("garbage-1", "nobody", Header(endpoint="work"), b"body").fields())
_REPLY = _pairs(Reply("garbage-1", 200, body=b"body").fields())
_NAMES = st.sampled_from(sorted({*_ENTRY, *_REPLY})) | st.binary(max_size=8)


def garbage(whole: Fields) -> st.SearchStrategy[Fields]:
    """Random fields; and what was once whole, with a wrong version, a field less, or one cut short or replaced."""

    def spoiled(name: bytes, value: bytes, cut: int) -> Fields:
        return {**whole, name: whole[name][:cut] if cut else value}

    def without(name: bytes) -> Fields:
        return {kept: value for kept, value in whole.items() if kept != name}

    def of_version(version: bytes) -> Fields:
        return {**whole, b"v": b"x" + version}

    names = st.sampled_from(sorted(whole))
    return st.one_of(
        st.dictionaries(_NAMES, st.binary(max_size=200), min_size=1, max_size=8),
        st.builds(of_version, st.binary(max_size=3)),
        st.builds(without, names),
        st.builds(spoiled, names, st.binary(max_size=20), st.integers(0, 4)),
    )


def _path(text: str) -> bytes:
    return b"/" + text.encode("utf-8", "surrogatepass")


def _header(text: str) -> bytes:
    return b"x-any: " + text.encode("utf-8", "surrogatepass")


def bad_requests() -> st.SearchStrategy[bytes]:
    """Bytes that begin like HTTP, more or less."""
    method = st.sampled_from([b"POST", b"POST", b"POST", b"GET", b"BREW", b"", b"PO\x00ST", b"\xff"])
    path = st.one_of(
        st.just(b"/job"),
        st.sampled_from([b"/", b"*", b"/%zz", b"/%ff%fe", b"/../../etc", b"//", b"/job?\xe2\x98\x83"]),
        st.text(max_size=30).map(_path),
    )
    version = st.sampled_from([*[b"HTTP/1.1"] * 6, b"HTTP/1.0", b"HTTP/9.9", b"HTPP", b""])
    header = st.one_of(
        st.sampled_from(
            [
                b"content-length: -1",
                b"content-length: 99999999999999999999",
                b"content-length: 5\r\ncontent-length: 6",
                b"content-length: 3",
                b"transfer-encoding: chunked",
                b"transfer-encoding: gzip, chunked",
                b"content-type: application/json",
                b"x-serve-call-method: __init__",
                b"x-serve-shard-key: \xff\xfe",
                b"x-request-id: " + b"i" * 5000,
                b"connection: \x01",
                b": empty",
                b"folded: a\r\n b",
                b"expect: 100-continue",
                b"x-" + bytes(range(0x21, 0x30)) + b": odd",
            ]
        ),
        st.text(max_size=30).map(_header),
    )
    body = st.sampled_from([b"", b"{", b'{"a":', b"[1,", b"\xff" * 10, b"zz\r\n", b"5\r\nab", b"0\r\n\r\n"])

    def request(first: tuple[bytes, bytes, bytes], headers: list[bytes], rest: bytes) -> bytes:
        return b" ".join(first) + b"\r\n" + b"\r\n".join([*headers, b"", b""]) + rest

    return st.builds(request, st.tuples(method, path, version), st.lists(header, max_size=3), body)


def for_each(examples: st.SearchStrategy[Any], count: int, do: Callable[[Any], None]) -> int:
    """Do it with ``count`` examples, or fewer if there are no more; return with how many."""
    done = 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=_SLOW)
    @given(examples)
    def run(example: Any) -> None:
        nonlocal done
        done += 1
        do(example)

    run()
    return done


def pids(client: serve.Client) -> set[int]:
    return {*replicas(client, "work").values(), *(one["pid"] for one in client.status()["proxies"].values())}


def test_garbage_on_the_streams_becomes_dead_letters_or_is_dropped(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    before, keys = pids(client), Keys("default")
    with (
        Redis.from_url(client.redis_url) as redis,
        traffic(client, rate=_RATE, for_s=scale.garbage / 20) as load,
    ):
        wait_until(lambda: load.outcomes.answered)
        callers = list(cast("Iterable[bytes]", redis.scan_iter("penstock:default:{*}:replies")))
        assert len(callers) >= 3  # the handle and both proxies

        def write_request(fields: Fields) -> None:
            redis.xadd(keys.requests("work"), cast("Any", fields))

        def write_replies(fields: Fields) -> None:
            for caller in callers:
                redis.xadd(caller, cast("Any", fields))

        requests = for_each(garbage(_ENTRY), scale.garbage, write_request)
        replies = for_each(garbage(_REPLY), scale.garbage, write_replies) * len(callers)
        wait_until(lambda: not load.sending, timeout_s=scale.garbage / 10 + 60)
        # What can still be read as a request is run, for a caller that is nobody.
        wait_until(lambda: redis.xlen(keys.requests("work")) == 0, timeout_s=30)
        buried = len(client.dead_letters("work"))
    seen = load.outcomes
    notes = f"{requests} bad requests ({buried} dead letters), {replies} bad replies"
    table.add(Row.of("garbage on streams", scale.garbage / 20, seen, notes=notes))
    assert check(seen, journal) == 0
    assert len(seen.answered) == seen.sent
    assert 0 < buried <= requests
    assert pids(client) == before


def test_malformed_http_gets_an_error_or_a_closed_connection(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    before, url = pids(client), urlsplit(str(client.http_url))
    answers = {"answered": 0, "hung up on": 0}

    def send(raw: bytes) -> None:
        with socket.create_connection((url.hostname, url.port or 80), timeout=_ANSWER_S) as to:
            # It may be refused before we have said all of it.
            with suppress(OSError):
                to.sendall(raw)
                to.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionError):
                while data := to.recv(65536):
                    answer += data
                    if len(answer) > 12:
                        break
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        status = int(answer[9:12]) if answer else 0
        assert status != 500, (raw, answer)
        answers["answered" if answer else "hung up on"] += 1

    with traffic(client, rate=_RATE, for_s=scale.garbage / 20) as load:
        # Somebody who never gets to the end of a sentence keeps nobody else from talking.
        slow = [socket.create_connection((url.hostname, url.port or 80)) for _ in range(50)]
        for one in slow:
            one.sendall(b"POST /job HTTP/1.1\r\ncontent-le")
        for_each(bad_requests(), scale.garbage, send)
        while load.sending:
            time.sleep(0.05)
    for one in slow:
        one.close()
    seen = load.outcomes
    notes = ", ".join(f"{count} {what}" for what, count in answers.items())
    table.add(Row.of("malformed HTTP", scale.garbage / 20, seen, notes=notes))
    assert check(seen, journal) == 0
    assert len(seen.answered) == seen.sent
    assert pids(client) == before
