"""The dashboard: a page of the admin port, and the stream of server-sent events that keeps it up to date.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from starlette.types import Receive, Send

from ...broker.errors import BrokerRefused, BrokerUnavailable
from ...broker.queue.stats import TIME_BOUNDS_S
from ...broker.results.counts import sum_by_endpoint
from ...handles.calls.request_client import RequestClient
from ...handles.errors import from_wire
from ..responses import HTTPResponse
from .dead_letters import DeadLetterPages
from .instance_state import InstanceState, read_instance

EVERY_S = 1.0
"""Seconds between two readings of the instance that a page gets."""

_READ_TIMEOUT_S = 5.0

_MAX_STREAMS = 32
"""Pages that one proxy keeps up to date. Each costs the broker a few commands for each backend a second."""

_MOST_ROWS = 200
"""Replicas, and jobs, that a page shows: those first that are not ready, and those that run."""

_PAGE = Path(__file__).with_name("dashboard.html").read_bytes()


def _digest_of_script(page: bytes) -> bytes:
    """Return the digest of the page's one script, as a content security policy names it."""
    script = page.partition(b"<script>")[2].partition(b"</script>")[0]
    return base64.b64encode(hashlib.sha256(script).digest())


_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    # All of it is in the page: nothing is loaded from elsewhere, what the broker holds is shown as text, and no script
    # but the page's own runs.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'sha256-%b'; style-src 'unsafe-inline'; connect-src 'self'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'" % _digest_of_script(_PAGE),
    ),
    (b"x-content-type-options", b"nosniff"),
]


class Dashboard:
    """The page of one proxy's instance.

    Args:
        caller: the client by which the proxy publishes.
        dead_letters: the pages by which its script lists, replays and drops dead letters.
    """

    def __init__(self, caller: RequestClient, dead_letters: DeadLetterPages) -> None:
        self._caller, self.dead_letters = caller, dead_letters
        self._streams = 0
        self._closing = asyncio.Event()

    def page(self) -> HTTPResponse:
        """Return the page. It is the same for every instance; its script reads the events."""
        return HTTPResponse(200, _HEADERS, _PAGE)

    @property
    def is_full(self) -> bool:
        """Whether no more pages are kept up to date."""
        return self._streams >= _MAX_STREAMS

    async def send_events(self, receive: Receive, send: Send) -> None:
        """Send the state of the instance again and again, until the client disconnects."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(self._until_over(receive))
        self._streams += 1
        try:
            while not gone.done():
                await send({"type": "http.response.body", "body": await self._event(), "more_body": True})
                await asyncio.wait([gone], timeout=EVERY_S)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._streams -= 1
            gone.cancel()

    def close(self) -> None:
        """End all streams of events."""
        self._closing.set()

    async def _until_over(self, receive: Receive) -> None:
        """Return when the client has disconnected, or the proxy ends."""
        either = [asyncio.ensure_future(_disconnected(receive)), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()

    async def _event(self) -> bytes:
        try:
            state = await asyncio.wait_for(read_instance(self._caller), _READ_TIMEOUT_S)
        except (BrokerUnavailable, BrokerRefused, asyncio.TimeoutError) as e:
            reason = type(e).__name__ if isinstance(e, asyncio.TimeoutError) else "the broker is away"
            return b"event: problem\ndata: %b\n\n" % orjson.dumps(reason)
        return b"event: state\ndata: %b\n\n" % orjson.dumps(self._members(state))

    def _members(self, state: InstanceState) -> dict[str, Any]:
        now_ms = self._caller.connection.now_ms()
        replicas = sorted(state.replicas.items(), key=lambda item: (item[1].state == "ready", item[0]))
        jobs = sorted(state.jobs.items(), key=lambda item: (item[1].state_at(now_ms) != "running", -item[1].started_ms))
        return {
            "at_ms": now_ms,
            "bounds_s": TIME_BOUNDS_S,
            "can_change": self.dead_letters.can_change,
            "controller": state.controller,
            "memory_bytes": state.memory_bytes,
            "memory_limit_bytes": state.memory_limit_bytes,
            "backends": {tag: _backend(state, tag) for tag in sorted(state.stats)},
            "replicas": [
                {"name": name, "backend": one.backend, "state": one.state, "node": one.node, "pid": one.pid}
                for name, one in replicas[:_MOST_ROWS]
            ],
            "replicas_left_out": max(0, len(replicas) - _MOST_ROWS),
            "endpoints": [
                {"name": name, "route": one.route, "traffic": _shares(one.traffic), "shadows": _shares(one.shadows)}
                for name, one in sorted(self._caller.snapshot.endpoints.items())
            ],
            "submitted": [
                {"endpoint": endpoint, **counts} for endpoint, counts in sum_by_endpoint(state.kept.values()).items()
            ],
            "jobs": [{"name": name, **asdict(one), "state": one.state_at(now_ms)} for name, one in jobs[:_MOST_ROWS]],
            "proxies": [
                {"name": name, "url": one.url, "state": one.state, "node": one.node}
                for name, one in sorted(state.proxies.items())
            ],
        }


def _backend(state: InstanceState, tag: str) -> dict[str, Any]:
    stats, status = state.stats[tag], state.statuses.get(tag)
    return {
        "queued": stats.queued,
        "in_progress": stats.in_progress,
        "oldest_s": stats.oldest_s,
        "served": stats.served,
        "failed": stats.failed,
        "refused": stats.refused,
        "ran": stats.ran,
        "waited": stats.waited,
        "dead_letters": stats.dead_letters,
        "ready": 0 if status is None else status.ready,
        "wanted": 0 if status is None else status.wanted,
        "failing": str(from_wire(status.failing)) if status is not None and status.failing else None,
        "lacking": None if status is None else status.lacking or status.waits_for_nodes,
    }


def _shares(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{tag} {100 * weight:.3g}%" for tag, weight in sorted(weights.items()))


async def _disconnected(receive: Receive) -> bool:
    while (await receive())["type"] != "http.disconnect":
        pass
    return True
