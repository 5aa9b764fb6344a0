"""The status of an instance: a dict for programs that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..handles.errors import BackendError, from_wire

_LAST_LINES = 5


class Status(dict[str, Any]):
    """``{"backends": {tag: …}, "endpoints": {name: …}, "proxies": {name: …}, "controller": "alive"}``.

    ``str`` of it is a table: what the command ``penstock status`` shows.

    Of a backend: its ``version``; how many replicas are ``wanted``, ``ready`` and ``starting``; what is ``failing``, an
    error as text with the last lines of its traceback, or ``lacking`` in the cluster, or None; which change was
    ``refused`` last and why, until a later one has come about; how many requests are ``queued`` and ``in_progress``,
    and the ``queued_bytes`` of both; how many are ``dead_letters``, and how many of these were dropped as there were
    too many or they were too old (``dead_letters_dropped``); how many its replicas have ``served`` since it was
    created, up to a second ago, and ``failed``, which is to answer with an error; and ``mean_run_ms``, how long one
    ran. Of an endpoint: what ``list_endpoints`` has. Of a proxy: its ``node``, ``url``, ``state`` and ``pid``. While
    the controller is ``"away"`` or ``"waiting for Ray's head"``, what runs serves on, and no change comes about.
    """

    def __str__(self) -> str:
        backends, endpoints, proxies = self["backends"], self["endpoints"], self["proxies"]
        parts: list[str] = []
        if backends:
            # Short, to fit a terminal of 80 columns.
            head = ("backend", "version", "replicas", "queued", "running", "dead", "served", "failed", "mean ms")
            rows = [
                (tag, b["version"], f"{b['ready']} of {b['wanted']}", *_counts(b))
                for tag, b in sorted(backends.items())
            ]
            parts.append(table(head, rows))
        for tag, backend in sorted(backends.items()):
            parts += [f"{tag} {trouble}".replace("\n", "\n    ") for trouble in _troubles(backend)]
        if endpoints:
            rows = [
                (name, e["route"] or "-", " ".join(e["methods"]), _traffic(e)) for name, e in sorted(endpoints.items())
            ]
            parts.append(table(("endpoint", "route", "methods", "traffic"), rows))
        if proxies:
            rows = [
                (p.get("node", "")[:12], name, p.get("url") or "-", p.get("state", "")) for name, p in proxies.items()
            ]
            parts.append(table(("node", "proxy", "url", "state"), sorted(rows)))
        if self["controller"] != "alive":
            parts.append(f"the controller is {self['controller']}: what runs serves on, and no change comes about")
        return "\n\n".join(parts) or "nothing is deployed"


def _troubles(backend: Mapping[str, Any]) -> list[str]:
    """Return what keeps a backend from being all it should be, as the ends of sentences that begin with its tag."""
    said = [f"is {trouble}: {backend[trouble]}" for trouble in ("failing", "lacking") if backend[trouble]]
    if count := backend["starting"]:
        said.insert(0, f"is starting {count} replica{'s' if count > 1 else ''}")
    return [*said, f"refused {backend['refused']}"] if backend["refused"] else said


def explained_refusal(refused: Mapping[str, Any] | None) -> str | None:
    """Return as text which change was refused, and why."""
    if not refused:
        return None
    return f"version {refused['version']}: {explained(refused['failing']) or refused['lacking']}"


def explained(failing: Mapping[str, Any] | None) -> str | None:
    """Return an error as text: what it is, and the last lines of its traceback."""
    if not failing:
        return None
    error = from_wire(failing)
    if not isinstance(error, BackendError):
        return str(error)
    said = f"{error.type_name}: {error.message}"
    lines = error.traceback.strip().splitlines()
    return "\n".join([said, *lines[-_LAST_LINES - 1 : -1]] if len(lines) > 1 else [said])


def _counts(backend: Mapping[str, Any]) -> tuple[str, ...]:
    counted = ("queued", "in_progress", "dead_letters", "served", "failed", "mean_run_ms")
    return tuple(f"{backend[name]:.10g}" for name in counted)


def _traffic(endpoint: Mapping[str, Any]) -> str:
    shares = [f"{tag} {weight:.4g}" for tag, weight in endpoint["traffic"].items()]
    return ", ".join([*shares, *(f"{tag} shadowed {share:.4g}" for tag, share in endpoint["shadows"].items())])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows below their head, each a line, each column as wide as it must be."""
    lines = [head, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
