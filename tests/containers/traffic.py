"""A steady load of HTTP requests through the load balancer, and what became of each of them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.faults.load.table import Row
from tests.support.loop_thread import running_beside

_REPEATED_FOR_S = 120.0
"""How long a client repeats what was refused."""
_AGAIN_S = 0.2
_ANSWER_S = 60.0

_runs = itertools.count()


@dataclass
class Outcomes:
    """The outcomes of the requests of one load. Each that was sent is answered or lost."""

    sent: int = 0
    answers: Counter[str] = field(default_factory=Counter[str])
    """The bodies of the answers, counted."""
    took_s: list[float] = field(default_factory=list[float])
    """From the first attempt to the answer."""
    refused: Counter[str] = field(default_factory=Counter[str])
    """503, by who refused: the client repeats the request with the same key."""
    cut: int = 0
    """The connection broke, or the balancer answered 502 as its own to a proxy broke: the client repeats these, too."""
    lost: list[str] = field(default_factory=list[str])

    @property
    def answered(self) -> int:
        return self.answers.total()

    def row(self, scenario: str, seconds: float) -> Row:
        """Return the row of these outcomes in the table of faults."""
        took_ms = sorted(1000 * took_s for took_s in self.took_s) or [0.0]
        return Row(
            scenario,
            seconds,
            self.sent,
            self.answered,
            dict(self.refused),
            self.cut,
            lost=len(self.lost),
            p50_ms=round(took_ms[len(took_ms) // 2], 1),
            p99_ms=round(took_ms[int(0.99 * (len(took_ms) - 1))], 1),
            notes=f"longest {took_ms[-1] / 1000:.1f} s",
        )


class Traffic:
    """Requests that leave at ``rate`` a second until `end`, whatever becomes of them; each has an Idempotency-Key."""

    def __init__(self, url: str, body: object, rate: float) -> None:
        self._url, self._body, self._rate = url, body, rate
        self._run = next(_runs)
        self._ended = threading.Event()
        self.outcomes = Outcomes()

    def end(self) -> None:
        self._ended.set()

    async def run(self) -> None:
        began_s, pending = time.monotonic(), set[asyncio.Task[None]]()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=_ANSWER_S, limits=limits) as http:
            while not self._ended.is_set():
                while self.outcomes.sent < (time.monotonic() - began_s) * self._rate:
                    self.outcomes.sent += 1
                    task = asyncio.ensure_future(self._one(http, f"{self._run}-{self.outcomes.sent}"))
                    pending.add(task)
                    task.add_done_callback(pending.discard)
                await asyncio.sleep(0.02)
            await asyncio.gather(*pending)

    async def _one(self, http: httpx.AsyncClient, key: str) -> None:
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < _REPEATED_FOR_S:
            try:
                answer = await http.post(self._url, json=self._body, headers={"Idempotency-Key": key})
            except httpx.TimeoutException as e:
                self.outcomes.lost.append(f"{key}: {e!r}, {passed_s:.1f} s after it was first sent")
                return
            except httpx.TransportError:
                self.outcomes.cut += 1
                continue
            if answer.status_code == 200:
                self.outcomes.answers[answer.text] += 1
                self.outcomes.took_s.append(time.monotonic() - began_s)
                return
            # HAProxy's own answer is a page, and a proxy's names an error.
            by_proxy = answer.headers["content-type"].startswith("application/json")
            if answer.status_code == 503:
                self.outcomes.refused["by a proxy" if by_proxy else "by the balancer"] += 1
            elif answer.status_code == 502 and not by_proxy:
                self.outcomes.cut += 1
            else:
                self.outcomes.lost.append(f"{key}: {answer.status_code} {answer.text[:200]}")
                return
            await asyncio.sleep(_AGAIN_S)
        self.outcomes.lost.append(f"{key}: no answer within {_REPEATED_FOR_S:g} s")


@contextmanager
def traffic(url: str, body: object, rate: float) -> Generator[Outcomes]:
    """Send a body to ``url``, ``rate`` times a second, while the block runs; then wait for all outcomes."""
    running = Traffic(url, body, rate)
    with running_beside(running.run, "traffic", running.end):
        yield running.outcomes
