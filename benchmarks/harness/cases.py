"""Cases that are measured on systems that answer HTTP."""

from __future__ import annotations

import json
from dataclasses import dataclass

SIX = (
    0, 0, 0, 12, 13, 0, 0, 0,
    0, 0, 5, 16, 8, 0, 0, 0,
    0, 0, 13, 16, 3, 0, 0, 0,
    0, 0, 14, 13, 0, 0, 0, 0,
    0, 0, 15, 12, 7, 2, 0, 0,
    0, 0, 13, 16, 13, 16, 3, 0,
    0, 0, 7, 16, 11, 15, 8, 0,
    0, 0, 1, 9, 15, 11, 3, 0,
)  # fmt: skip
"""The first six of scikit-learn's handwritten digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload, under several numbers of connections or, in an open loop, under several rates."""

    name: str
    title: str
    workload: str
    systems: tuple[str, ...]
    connections: tuple[int, ...] = ()
    rates_per_s: tuple[int, ...] = ()
    replicas: int = 1
    body_bytes: int = 8

    def body(self) -> bytes:
        """Bytes that are JSON too, since LitServe takes nothing else: an image, or a string of the wanted length."""
        if self.workload == "digits":
            return json.dumps(SIX).encode()
        return b'"' + b"x" * (self.body_bytes - 2) + b'"'

    def answer(self) -> bytes:
        """Return the body of a correct response, without its white space."""
        if self.workload == "digits":
            return b'{"digit":6}'
        return self.body() if self.workload == "echo" else b'{"ok":true}'


def counted(replicas: int) -> str:
    return f"{replicas} replica" + ("" if replicas == 1 else "s")


ALL = ("penstock", "penstock-async", "ray", "ray-haproxy", "ray-haproxy-def", "litserve", "mosec", "uvicorn")
ECHO = ("penstock", "ray", "ray-haproxy", "litserve", "mosec", "uvicorn")
PATHS = ("path", "path-xadd", "path-script")
SLEEP = ("penstock", "ray", "ray-haproxy", "litserve", "mosec")

CASES = {
    case.name: case
    for case in (
        Case(name="noop", title="No-op backend, 1 replica", workload="noop", connections=(1, 32, 100), systems=ALL),
        Case(name="echo-1k", title="Echo of 1 KiB", workload="echo", connections=(32,), systems=ECHO,
             body_bytes=1024),
        Case(name="echo-100k", title="Echo of 100 KiB", workload="echo", connections=(32,), systems=ECHO,
             body_bytes=100 * 1024),
        Case(name="echo-10m", title="Echo of 10 MiB", workload="echo", connections=(1, 16), systems=ECHO,
             body_bytes=10 * 1024 * 1024),
        *(
            Case(name=f"sleep-{replicas}", title=f"Blocking 10 ms backend, {counted(replicas)} (at best "
                 f"{replicas * 100} requests/s)", workload="sleep", connections=(4 * replicas,), systems=SLEEP,
                 replicas=replicas)
            for replicas in (1, 4, 8)
        ),
        Case(name="digits", title="Classifier of handwritten digits in batches of up to 64, 1 replica",
             workload="digits", connections=(32, 100), systems=SLEEP),
        Case(name="bare", title="What the defaults cost: Penstock without Ray, with them and without",
             workload="noop", connections=(100,), systems=PATHS),
        Case(name="open-noop", title="No-op backend, open loop: from idle up", workload="noop", systems=ALL,
             rates_per_s=(10, 250, 1_000, 2_000, 4_000, 8_000)),
        *(
            Case(name=f"open-sleep-{replicas}", title=f"Blocking 10 ms backend, {counted(replicas)}, open loop at 80 % "
                 "of capacity", workload="sleep", systems=SLEEP, rates_per_s=(80 * replicas,), replicas=replicas)
            for replicas in (1, 4, 8)
        ),
    )
}  # fmt: skip
