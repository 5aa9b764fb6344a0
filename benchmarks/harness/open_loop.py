"""Open-loop load: requests leave at given moments, whether or not earlier ones were answered.

A closed loop waits for a slow server and so hides how long its callers would queue. This one does not. It runs as a
program of its own:

    python open_loop.py URL METHOD BODY_FILE CONTENT_TYPE RATE_PER_S SECONDS SEED SERVERS SERVICE_S

A latency runs from the moment the generator got to a request, be a connection free for it or not. How late it was
with that is reported beside it (``lag``): as long as that stays small, the generator is not what is measured. With
``SERVERS`` it also prints what one shared queue before so many servers, each taking ``SERVICE_S`` for a request,
would have made of the very same arrivals.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import heapq
import json
import os
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

CONNECTIONS = 32
MOST_CONNECTIONS = 1_000
LAST_ANSWERS_WITHIN_S = 10.0


def arrivals(rate_per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process, in seconds from its start."""
    chance = random.Random(seed)
    at = chance.expovariate(rate_per_s)
    while at < seconds:
        yield at
        at += chance.expovariate(rate_per_s)


def optimum(sent: Sequence[float], servers: int, service_s: float) -> list[float]:
    """Latencies that one shared first-come queue gives to requests sent at these moments.

    >>> optimum([0.0, 0.0, 0.0], servers=2, service_s=0.5)
    [0.5, 0.5, 1.0]
    """
    free = [0.0] * servers
    found = []
    for at in sent:
        done = max(at, heapq.heappop(free)) + service_s
        heapq.heappush(free, done)
        found.append(done - at)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed; 0 without values.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)] if ordered else 0.0


class Alarm:
    """Calls back at a moment of ``time.perf_counter``, to some tens of microseconds.

    An event loop's own timers are only as fine as a millisecond, and passing the rest with polls would take
    the core that the server needs. Linux only: ``timerfd_create(2)``.
    """

    class Spec(ctypes.Structure):
        _fields_ = (
            ("interval_s", ctypes.c_long),
            ("interval_ns", ctypes.c_long),
            ("value_s", ctypes.c_long),
            ("value_ns", ctypes.c_long),
        )

    def __init__(self, rings: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._rings = rings
        asyncio.get_running_loop().add_reader(self._fd, self._ring)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._rings()

    def set(self, at: float) -> None:
        left_ns = max(1, int((at - time.perf_counter()) * 1e9))
        spec = self.Spec(0, 0, left_ns // 1_000_000_000, left_ns % 1_000_000_000)
        self._libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


class Connection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.due_at = -1.0
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes, due_at: float) -> None:
        assert self.transport is not None
        self.due_at = due_at
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head_end = self.received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self.received[:head_end]).lower()
        at = head.find(b"content-length:")
        if at >= 0:
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self.received) < head_end + 4 + length:
                return
        elif not self.received.endswith(b"0\r\n\r\n"):
            return
        ok = head[9:10] == b"2"
        self.received.clear()
        self.generator.answered(self, ok)

    def connection_lost(self, exc: Exception | None) -> None:
        self.generator.lost(self)


class Generator:
    """Writes each request when it is due, and keeps what became of it."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.host, self.port, self.request = host, port, request
        self.idle: list[Connection] = []
        self.open = 0
        self.waiting: deque[float] = deque()
        self.sent: list[float] = []
        self.lags: list[float] = []
        self.latencies: list[float] = []
        self.not_2xx = 0
        self.lost_requests = 0

    async def connect(self) -> Connection:
        self.open += 1
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self), self.host, self.port
        )
        return connection

    def due(self, lag_s: float) -> None:
        """A request is due since ``lag_s``."""
        now = time.perf_counter()
        self.lags.append(lag_s)
        self.sent.append(now)
        if self.idle:
            self.idle.pop().ask(self.request, now)
        else:
            self.waiting.append(now)
            if self.open < MOST_CONNECTIONS:
                asyncio.ensure_future(self.widen())  # noqa: RUF006  (it ends long before the loop does)

    async def widen(self) -> None:
        try:
            connection = await self.connect()
        except OSError:
            self.open -= 1
        else:
            self.free(connection)

    def free(self, connection: Connection) -> None:
        if self.waiting:
            connection.ask(self.request, self.waiting.popleft())
        else:
            self.idle.append(connection)

    def answered(self, connection: Connection, ok: bool) -> None:
        self.latencies.append(time.perf_counter() - connection.due_at)
        self.not_2xx += not ok
        connection.due_at = -1.0
        self.free(connection)

    def lost(self, connection: Connection) -> None:
        self.open -= 1
        if connection.due_at >= 0:
            self.lost_requests += 1
        elif connection in self.idle:
            self.idle.remove(connection)

    async def run(self, moments: Sequence[float]) -> None:
        self.idle = [await self.connect() for _ in range(CONNECTIONS)]
        began = time.perf_counter() + 0.05
        sent_all = asyncio.Event()
        left = iter(moments)
        at = next(left, None)

        def send_what_is_due() -> None:
            nonlocal at
            while at is not None and (lag_s := time.perf_counter() - began - at) >= 0:
                self.due(lag_s)
                at = next(left, None)
            if at is None:
                sent_all.set()
            else:
                alarm.set(began + at)

        alarm = Alarm(send_what_is_due)
        send_what_is_due()
        await sent_all.wait()
        alarm.close()
        give_up = time.perf_counter() + LAST_ANSWERS_WITHIN_S
        while len(self.latencies) + self.lost_requests < len(moments) and time.perf_counter() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def main(words: Sequence[str]) -> None:
    """Load as asked, and print one line of JSON."""
    url, method, body_file, kind, rate, seconds, seed, servers, service_s = words
    parts = urlsplit(url)
    body = Path(body_file).read_bytes() if body_file else b""
    head = f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    if body_file:
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    generator = Generator(parts.hostname or "", parts.port or 80, head.encode() + b"\r\n" + body)
    moments = list(arrivals(float(rate), float(seconds), int(seed)))
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(generator.run(moments))
    latencies = generator.latencies
    ideal = optimum(generator.sent, int(servers), float(service_s)) if int(servers) else []
    used = resource.getrusage(resource.RUSAGE_SELF)
    said: dict[str, float] = {
        "asked": len(moments),
        "answered": len(latencies),
        "not_2xx": generator.not_2xx,
        "unanswered": len(moments) - len(latencies),
        "cpu_s": used.ru_utime + used.ru_stime,
    }
    for name, values in (("", latencies), ("lag_", generator.lags), ("optimum_", ideal)):
        for label, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            said[f"{name}{label}_ms"] = percentile(values, share) * 1e3
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
