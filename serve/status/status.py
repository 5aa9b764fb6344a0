"""The status of an instance: a dict for programs that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...broker.registry.reports import RefusedChange
from ...handles.errors import BackendError, from_wire
from ...runtime.notebooks import paragraph_html, table_html

_TRACEBACK_LINES = 5
"""The last lines of a traceback that a status shows."""


class _Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Status(dict[str, Any]):
    """``{"backends": {tag: …}, "endpoints": {…}, "proxies": {…}, "controller": "alive", "warnings": […], …}``.

    Printed, or shown by an interactive interpreter or a notebook, it is a table, which ``penstock status`` shows as
    well.

    Fields of a backend:

    - ``version``, and ``config_version``, the version of its configuration;
    - ``wanted``, ``ready``, ``starting``: numbers of replicas;
    - ``rolled_out``: whether this version and configuration were complete at some time;
    - ``failing``: the error of a replica that could not start, with the last lines of its traceback, or None;
    - ``lacking``: the resources that the cluster does not have, or None;
    - ``waits_for_nodes``: the same where Ray's autoscaler adds nodes for them, or None;
    - ``refused``: the last change that was undone, and why; None once a later one is rolled out;
    - ``queued``, ``in_progress``: numbers of requests, and ``queued_bytes``, the bytes of both;
    - ``dead_letters``, and ``dead_letters_dropped``: those dropped because there were too many or they were too old;
    - ``served``, ``failed``: requests since the backend was created, up to a second ago; a failed one was answered
      with an error;
    - ``retried``: attempts that failed and were followed by another one (``RetryConfig``);
    - ``mean_run_ms``: the mean run time of a request in milliseconds.

    Fields of an endpoint are those of `Client.list_endpoints`; of a proxy: ``node``, ``url``, ``state`` and ``pid``.

    ``submitted`` has the numbers of submitted requests, and of those with an idempotency key, by endpoint and state;
    those in a final state are counted since the backend was created. ``jobs`` has the batch jobs whose results have not
    expired, each with ``job``, its name, ``endpoint``, ``state`` (``running``, ``finished``, ``failed`` or
    ``stopped``), ``done``, ``errors`` and ``total``: numbers of items.

    ``controller`` is ``"alive"``, ``"away"`` or ``"waiting for Ray's head"``. Unless it is alive, running replicas and
    proxies serve, and changes are not carried out.

    ``warnings`` are sentences: HTTP is served on another node than the one of ``start``, because that one is gone; or
    Ray has given replicas or proxies a raised niceness.
    """

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n\n".join(table(*part) if isinstance(part, _Table) else part for part in self._parts())

    def _repr_html_(self) -> str:
        return "".join(
            table_html(*part) if isinstance(part, _Table) else paragraph_html(part) for part in self._parts()
        )

    def _parts(self) -> list[_Table | str]:
        """Return what is shown: tables, and sentences between them."""
        parts: list[_Table | str] = []
        backends, endpoints, proxies = self["backends"], self["endpoints"], self["proxies"]
        if backends:
            # Short names, so that the table fits into 80 columns.
            head = ("backend", "version", "replicas", "queued", "running", "dead", "served", "failed", "mean ms")
            rows = [
                (tag, b["version"], f"{b['ready']} of {b['wanted']}", *_counts(b))
                for tag, b in sorted(backends.items())
            ]
            parts.append(_Table(head, rows))
        for tag, backend in sorted(backends.items()):
            parts += [f"{tag} {trouble}".replace("\n", "\n    ") for trouble in _troubles(backend)]
        if endpoints:
            rows = [
                (name, e["route"] or "-", " ".join(e["methods"]), _traffic(e)) for name, e in sorted(endpoints.items())
            ]
            parts.append(_Table(("endpoint", "route", "methods", "traffic"), rows))
        if proxies:
            rows = [
                (p.get("node", "")[:12], name, p.get("url") or "-", p.get("state", "")) for name, p in proxies.items()
            ]
            parts.append(_Table(("node", "proxy", "url", "state"), sorted(rows)))
        if jobs := self.get("jobs"):
            rows = [
                (
                    job["job"],
                    job["endpoint"],
                    job["state"],
                    f"{job['done']}",
                    f"{job['total'] or '-'}",
                    f"{job['errors']}",
                )
                for job in jobs.values()
            ]
            parts.append(_Table(("job", "endpoint", "state", "done", "of", "errors"), sorted(rows)))
        if self["controller"] != "alive":
            parts.append(f"the controller is {self['controller']}: running replicas serve, and changes wait")
        parts += [f"warning: {warning}" for warning in self.get("warnings", ())]
        return parts or ["nothing is deployed"]


def _troubles(backend: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a backend is not complete, each as a sentence without its subject, the tag."""
    troubles: list[str] = []
    if count := backend["starting"]:
        troubles.append(f"is starting {plural(count, 'replica')}")
    if backend["failing"]:
        troubles.append(f"is failing: {backend['failing']}")
    if backend["lacking"]:
        troubles.append(f"lacks resources: {backend['lacking']}")
    if backend["waits_for_nodes"]:
        troubles.append(f"waits for nodes: {backend['waits_for_nodes']}")
    if backend["refused"]:
        troubles.append(f"refused {backend['refused']}")
    return troubles


def plural(count: int, noun: str) -> str:
    """Return a number of things as text.

    >>> plural(1, "replica"), plural(2, "replica")
    ('1 replica', '2 replicas')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def describe_refusal(refused: RefusedChange | None) -> str | None:
    """Return a refused change as text, with the reason."""
    if refused is None:
        return None
    return f"version {refused.version}: {describe_error(refused.failing) or refused.lacking}"


def describe_error(failing: Mapping[str, Any] | None) -> str | None:
    """Return an error of a replica's start as text, with the last lines of its traceback."""
    if not failing:
        return None
    error = from_wire(failing)
    if not isinstance(error, BackendError):
        return str(error)
    summary = f"{error.type_name}: {error.message}"
    lines = error.traceback.strip().splitlines()
    return "\n".join([summary, *lines[-_TRACEBACK_LINES - 1 : -1]] if len(lines) > 1 else [summary])


def _counts(backend: Mapping[str, Any]) -> tuple[str, ...]:
    counted = ("queued", "in_progress", "dead_letters", "served", "failed", "mean_run_ms")
    return tuple(f"{backend[name]:.10g}" for name in counted)


def _traffic(endpoint: Mapping[str, Any]) -> str:
    shares = [f"{tag} {weight:.4g}" for tag, weight in endpoint["traffic"].items()]
    return ", ".join([*shares, *(f"{tag} shadowed {share:.4g}" for tag, share in endpoint["shadows"].items())])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a head and rows as lines of text, with aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
