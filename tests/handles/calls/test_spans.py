"""Spans of OpenTelemetry, from publishing a request to its reply. They need the ``traces`` extra."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from penstock import handles
from penstock.handles.calls import tracing
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError
from tests.handles.calls.test_tracing import TRACE_ID, TRACEPARENT, seen
from tests.handles.site import INSTANCE, Site
from tests.support.waiting import wait_until

trace: Any = pytest.importorskip("opentelemetry.trace")
sdk: Any = pytest.importorskip("opentelemetry.sdk.trace")
export: Any = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

Exporter = Any
Span = Any

_exporter = in_memory.InMemorySpanExporter()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """The exporter of the spans of this process, while the test runs."""
    if not isinstance(trace.get_tracer_provider(), sdk.TracerProvider):
        provider = sdk.TracerProvider()
        provider.add_span_processor(export.SimpleSpanProcessor(_exporter))
        trace.set_tracer_provider(provider)
    monkeypatch.setattr(tracing, "spans", None)
    tracing.configure("tests", "global")
    _exporter.clear()
    return _exporter


def named(exporter: Exporter, count: int) -> dict[str, Span]:
    """Return the spans by their names, once there are ``count``."""
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    spans = exporter.get_finished_spans()
    assert len(spans) == count, [span.name for span in spans]
    return {span.name: span for span in spans}


def id_of(span: Span) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def parent_of(span: Span) -> int | None:
    return None if span.parent is None else span.parent.span_id


def test_a_call_has_spans_from_publishing_to_its_reply(site: Site, connected: Connection, exporter: Exporter) -> None:
    def work(request: Any) -> str:
        with trace.get_tracer("code").start_as_current_span("inside"):
            return "done"

    site.serve(work)
    handle = connected.get_handle("ask").options(http_headers={"traceparent": TRACEPARENT})
    assert handle.remote().result(20) == "done"
    spans = named(exporter, 6)
    call, send, queue, process, reply, inside = (
        spans[name] for name in ("call ask", "send model", "queue model", "process model", "reply model", "inside")
    )
    assert {f"{span.context.trace_id:032x}" for span in spans.values() if span.context} == {TRACE_ID}
    assert parent_of(call) == 0xB7AD6B7169203331
    assert parent_of(send) == id_of(call)
    assert {parent_of(span) for span in (queue, process, reply)} == {id_of(send)}
    assert parent_of(inside) == id_of(process)
    assert (call.kind, send.kind, process.kind) == (
        trace.SpanKind.CLIENT,
        trace.SpanKind.PRODUCER,
        trace.SpanKind.CONSUMER,
    )
    operations = {send: "send", queue: "receive", process: "process", reply: "settle"}
    for span, operation in operations.items():
        assert span.attributes["messaging.system"] == "penstock"
        assert span.attributes["messaging.destination.name"] == "model"
        assert span.attributes["messaging.operation.type"] == operation
        assert span.attributes["messaging.operation.name"] == operation
    assert call.attributes["http.response.status_code"] == 200
    for first, then in ((send, call), (queue, process), (process, reply)):
        assert first.end_time is not None
        assert then.end_time is not None
        assert first.end_time <= then.end_time


def test_an_error_is_the_status_of_its_spans(site: Site, connected: Connection, exporter: Exporter) -> None:
    def fail(request: Any) -> None:
        raise KeyError("nothing")

    site.serve(fail)
    with pytest.raises(BackendError):
        connected.get_handle("ask").remote().result(20)
    spans = named(exporter, 5)
    for name in ("call ask", "process model"):
        assert spans[name].status.status_code is trace.StatusCode.ERROR
        assert spans[name].status.description == "KeyError: 'nothing'"
        assert spans[name].attributes["error.type"] == "KeyError"


def test_items_of_a_batch_are_children_of_the_span_of_the_code_that_sends_them(
    site: Site, connected: Connection, exporter: Exporter
) -> None:
    site.serve(seen, "inner", tag="inner")

    def outer(request: Any) -> Any:
        with handles.connect(site.url, INSTANCE) as connection:
            return [result.value for result in connection.batch("inner").map([1, 2])]

    site.serve(outer, "outer", tag="outer")
    assert len(connected.get_handle("outer").remote().result(20)) == 2
    wait_until(lambda: len(exporter.get_finished_spans()) == 5 + 2 * 3)
    spans = exporter.get_finished_spans()
    (code,) = [span for span in spans if span.name == "process outer"]
    for name in ("queue inner", "process inner", "reply inner"):
        assert [parent_of(span) for span in spans if span.name == name] == [id_of(code)] * 2
    assert len({span.context.trace_id for span in spans}) == 1


def test_submitted_requests_have_the_spans_of_the_replica(
    site: Site, connected: Connection, exporter: Exporter
) -> None:
    site.serve(seen)
    handle = connected.get_handle("ask").options(http_headers={"traceparent": TRACEPARENT})
    assert handle.submit("x").result(timeout=20) == TRACEPARENT
    spans = named(exporter, 3)
    assert set(spans) == {"queue model", "process model", "reply model"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}


def test_composed_calls_are_children_of_the_span_of_their_code(
    site: Site, connected: Connection, exporter: Exporter
) -> None:
    site.serve(seen, "inner", tag="inner")

    def outer(request: Any) -> Any:
        with handles.connect(site.url, INSTANCE) as connection:
            return connection.get_handle("inner").remote().result(20)

    site.serve(outer, "outer", tag="outer")
    connected.get_handle("outer").remote().result(20)
    spans = named(exporter, 10)
    assert parent_of(spans["call inner"]) == id_of(spans["process outer"])
    assert parent_of(spans["process inner"]) == id_of(spans["send inner"])


def test_a_call_that_is_cancelled_ends_its_spans(site: Site, connected: Connection, exporter: Exporter) -> None:
    site.declare()
    call = connected.get_handle("ask").remote()
    wait_until(lambda: site.depth() == 1)
    call.cancel()
    assert set(named(exporter, 2)) == {"call ask", "send model"}


@contextmanager
def otlp_receiver() -> Generator[tuple[str, list[tuple[str, bytes]]]]:
    """A receiver of OTLP over HTTP: its URL, and the paths and bodies of what was posted."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="otlp receiver")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_spans_are_exported_by_otlp(site: Site) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    site.serve(seen)
    code = "import sys; from penstock import handles\nwith handles.connect(sys.argv[1]) as connection:\n"
    code += "    print(connection.get_handle('ask').remote('x').result(30))"
    with otlp_receiver() as (endpoint, received):
        settings = {
            "PENSTOCK_TRACES": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        ran = subprocess.run(
            [sys.executable, "-c", code, site.url],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    assert {path for path, _ in received} == {"/v1/traces"}
    exported = b"".join(body for _, body in received)
    assert b"send model" in exported
    assert b"penstock-caller" in exported
    assert ran.stdout.strip()[3:35].encode() not in (b"", b"None")  # the replica got the trace of the exported span
