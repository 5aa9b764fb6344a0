"""Trace context: W3C ``traceparent`` of requests, from their callers into replicas, and spans with OpenTelemetry.

A request carries the ``traceparent`` of its HTTP client, or of the request that a replica works on while its code calls
another backend. With ``PENSTOCK_TRACES`` set, each process also records spans: ``call`` and ``send`` at the caller, and
``queue``, ``process`` and ``reply`` at the replica. Without it no module of OpenTelemetry is imported.

https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from ...broker.errors import ConfigError
from ...broker.wire._fields import Pairs
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header
from ..errors import BackendError, from_wire
from ..log_context import current_work

TRACES = "PENSTOCK_TRACES"
"""The environment variable that turns spans on: ``otlp``, ``global``, or ``module:function``; see `configure`."""

TRACEPARENT = "traceparent"

_VALID = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

spans: Spans | None = None
"""Records spans; None unless `configure` was called with a value."""


def current_traceparent() -> str | None:
    """Return the ``traceparent`` that a request published in this context continues, if there is one.

    Several requests of a batch belong to different traces, so that its code continues none of them.
    """
    if spans is not None and (current := spans.current()) is not None:
        return current
    requests = current_work()
    return traceparent_of(requests[0].headers) if len(requests) == 1 else None


def traceparent_of(headers: Pairs) -> str | None:
    """Return the ``traceparent`` of a request's headers, unless it is malformed."""
    for name, value in headers:
        if name == TRACEPARENT:
            return value if _VALID.fullmatch(value) else None
    return None


def trace_headers() -> dict[str, str]:
    """Return the headers by which a request published in this context continues a trace; none without one."""
    traceparent = current_traceparent()
    return {} if traceparent is None else {TRACEPARENT: traceparent}


def with_traceparent(headers: Pairs, traceparent: str) -> Pairs:
    """Return ``headers`` with another ``traceparent``."""
    return [*((name, value) for name, value in headers if name != TRACEPARENT), (TRACEPARENT, traceparent)]


def configure(service: str, value: str | None = None) -> None:
    """Record spans from now on, if ``value``, or the environment variable `TRACES`, asks for it.

    Args:
        service: the ``service.name`` of this process for ``otlp``, unless ``OTEL_SERVICE_NAME`` is set.
        value: ``otlp`` exports to ``OTEL_EXPORTER_OTLP_ENDPOINT``; ``global`` uses the tracer provider that this
            process has configured; ``module:function`` calls the function, which configures one.

    Raises:
        ConfigError: a package is missing, or the function cannot be found.
    """
    global spans
    value = os.environ.get(TRACES, "") if value is None else value
    if not value or spans is not None:
        return
    try:
        if value == "otlp":
            _export(service)
        elif value != "global":
            module, _, function = value.partition(":")
            getattr(import_module(module), function)()
        spans = Spans()
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(
            f"{TRACES} is {value!r}, which cannot be used ({type(e).__name__}: {e}): it must be 'otlp' (needs "
            "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http), 'global' (needs opentelemetry-api) or "
            "'module:function'"
        ) from None


def _export(service: str) -> None:
    trace: Any = import_module("opentelemetry.trace")
    sdk: Any = import_module("opentelemetry.sdk.trace")
    resources: Any = import_module("opentelemetry.sdk.resources")
    export: Any = import_module("opentelemetry.sdk.trace.export")
    otlp: Any = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": name}))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


class Spans:
    """Starts and ends the spans of this process."""

    def __init__(self) -> None:
        self._trace: Any = import_module("opentelemetry.trace")
        self._propagation: Any = import_module("opentelemetry.trace.propagation.tracecontext")
        self._context: Any = import_module("opentelemetry.context")
        self._propagator: Any = self._propagation.TraceContextTextMapPropagator()
        self._tracer: Any = self._trace.get_tracer("penstock")

    def current(self) -> str | None:
        """Return the ``traceparent`` of the current span of this context; None without one."""
        span = self._trace.get_current_span()
        return self._traceparent(span) if span.get_span_context().is_valid else None

    def begin_call(self, endpoint: str, backend: str, header: Header) -> tuple[Header, CallSpans]:
        """Begin the spans of a call; return the header that the request is published with."""
        is_within_span = self._trace.get_current_span().get_span_context().is_valid
        parent = None if is_within_span else self._parent(header.headers)
        attributes = {**_attributes(backend, "send"), "penstock.endpoint": endpoint}
        call = self._tracer.start_span(
            f"call {endpoint}", context=parent, kind=self._trace.SpanKind.CLIENT, attributes=attributes
        )
        within = self._trace.set_span_in_context(call)
        send = self._tracer.start_span(
            f"send {backend}", context=within, kind=self._trace.SpanKind.PRODUCER, attributes=attributes
        )
        header = replace(header, headers=with_traceparent(header.headers, self._traceparent(send)))
        return header, CallSpans(call, send, self._failure)

    def begin_run(self, backend: str, header: Header, queued_ms: float) -> RunSpans:
        """Record the span of a request's time in the queue, and begin that of its run."""
        parent = self._parent(header.headers)
        now_ns = time.time_ns()
        queue = self._tracer.start_span(
            f"queue {backend}",
            context=parent,
            attributes=_attributes(backend, "receive"),
            start_time=now_ns - max(0, int(queued_ms * 1e6)),
        )
        queue.end(now_ns)
        process = self._tracer.start_span(
            f"process {backend}",
            context=parent,
            kind=self._trace.SpanKind.CONSUMER,
            attributes={**_attributes(backend, "process"), "messaging.message.id": header.request_id},
            start_time=now_ns,
        )
        return RunSpans(process, self._begin_reply(backend, parent), self._failure)

    def enter(self, run: RunSpans) -> object:
        """Make the span of a run the current one of this context; return what `leave` takes."""
        return self._context.attach(self._trace.set_span_in_context(run.process))

    def leave(self, token: object) -> None:
        """Undo `enter`."""
        self._context.detach(token)

    def _begin_reply(self, backend: str, parent: Any) -> Callable[[], Any]:
        return lambda: self._tracer.start_span(
            f"reply {backend}", context=parent, attributes=_attributes(backend, "settle")
        )

    def _parent(self, headers: Pairs) -> Any:
        carrier = {name: value for name, value in headers if name in (TRACEPARENT, "tracestate")}
        return self._propagator.extract(carrier, context=self._context.Context())

    def _traceparent(self, span: Any) -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=self._trace.set_span_in_context(span))
        return carrier[TRACEPARENT]

    def _failure(self, kind: str, message: str) -> Any:
        return self._trace.Status(self._trace.StatusCode.ERROR, f"{kind}: {message}")


Failure = Callable[[str, str], Any]


class CallSpans:
    """The spans of one call, at its caller."""

    def __init__(self, call: Any, send: Any, failure: Failure) -> None:
        self._call, self._send, self._failure = call, send, failure

    def then(self, on_outcome: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a function that ends the spans with an outcome and passes it on."""

        def pass_on(outcome: Any) -> None:
            self.end(outcome)
            on_outcome(outcome)

        return pass_on

    @contextmanager
    def ended_by_error(self) -> Generator[None]:
        """End the spans if the block raises: the request was not published."""
        try:
            yield
        except BaseException as e:
            self.end(e)
            raise

    def accepted(self, _: object = None) -> None:
        """End the span of publishing."""
        if self._send.is_recording():
            self._send.end()

    def end(self, outcome: object) -> None:
        """End all, with the outcome of the call; None for a call that was cancelled."""
        self.accepted()
        if isinstance(outcome, Reply):
            if outcome.error is not None:
                kind, message = _described(outcome.error)
                self._call.set_attribute("error.type", kind)
                self._call.set_status(self._failure(kind, message))
            self._call.set_attribute("http.response.status_code", outcome.status)
        elif isinstance(outcome, BaseException):
            self._call.set_attribute("error.type", type(outcome).__name__)
            self._call.set_status(self._failure(type(outcome).__name__, str(outcome)))
        self._call.end()


class RunSpans:
    """The spans of one request, at its replica."""

    def __init__(self, process: Any, begin_reply: Callable[[], Any], failure: Failure) -> None:
        self.process, self._begin_reply, self._failure = process, begin_reply, failure
        self._reply: Any = None

    def end_run(self, reply: Reply) -> None:
        """End the span of the run, and begin that of the reply."""
        if reply.error is not None:
            kind, message = _described(reply.error)
            self.process.set_attribute("error.type", kind)
            self.process.set_status(self._failure(kind, message))
        self.process.end()
        self._reply = self._begin_reply()

    def end_reply(self) -> None:
        """End the span of the reply, which is written."""
        self._reply.end()


def _described(error: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type and the message of a reply's error: those that the code raised, where it did."""
    raised = from_wire(error)
    if isinstance(raised, BackendError):
        return raised.type_name, raised.message
    return type(raised).__name__, str(raised)


def _attributes(backend: str, operation: str) -> dict[str, Any]:
    return {
        "messaging.system": "penstock",
        "messaging.destination.name": backend,
        "messaging.operation.name": operation,
        "messaging.operation.type": {"send": "send", "receive": "receive", "process": "process"}.get(
            operation, "settle"
        ),
    }
