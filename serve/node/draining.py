"""The end of a node without loss: its proxies and replicas move to other nodes, drain, and then Ray ends.

Ray's head records that the node drains. The controllers see it, start replicas elsewhere, let proxies fail their
readiness first, and drain both. What still serves after half of the time, because Ray's head or a controller is away,
gets SIGTERM from here: the proxies first, so that replicas can answer what they have accepted.
"""

from __future__ import annotations

import sys
import threading
import time
from enum import Enum

from .ray_node import PROXY, REPLICA, RayNode, terminate

_POLL_S = 0.2


class Outcome(Enum):
    """The end of a drain."""

    DRAINED = "drained"
    TIMED_OUT = "timed out"
    CUT_SHORT = "cut short"


def report(message: str) -> None:
    print(f"penstock node: {message}", file=sys.stderr, flush=True)


def drain(node: RayNode, timeout_s: float, hurry: threading.Event) -> Outcome:
    """Drain ``node`` within ``timeout_s`` seconds, or until ``hurry`` is set. Ray is still to be ended."""
    raylet, began_s = node.raylet(), time.monotonic()
    if raylet is None:
        return Outcome.DRAINED
    report(f"node {raylet.node_id} drains for at most {timeout_s:g} s")
    proxies_s, replicas_s = timeout_s / 2, timeout_s * 3 / 4
    if refusal := node.drain(raylet, timeout_s):
        report(f"Ray's head does not drain the node, so that nothing moves before it ends: {refusal}")
        proxies_s, replicas_s = 0.0, timeout_s / 2
    told = set[int]()
    while not hurry.wait(_POLL_S):
        passed_s = time.monotonic() - began_s
        proxies = node.serving(PROXY)
        left = [*proxies, *node.serving(REPLICA)]
        if not left or node.has_ended():
            return Outcome.DRAINED
        if passed_s > timeout_s:
            report(f"{len(left)} processes did not end within {timeout_s:g} s: their requests run again elsewhere")
            return Outcome.TIMED_OUT
        if passed_s > proxies_s:
            # A second signal would change nothing, but the process might have ended and its id be another one's.
            new = set(proxies if proxies and passed_s <= replicas_s else left) - told
            terminate(new)
            told |= new
    return Outcome.CUT_SHORT
