"""How many replicas a backend should have: a pure function of what its broker counts and of what was before.

It grows when the load has called for more during all of ``upscale_delay_s``, to the least that was called for
meanwhile; it shrinks when the load has called for fewer during all of ``downscale_delay_s``, to the most that was
called for meanwhile. So one short peak neither starts replicas nor keeps a lull from stopping some, and a load that
swings faster than the delays changes nothing.

A queue alone says too little on the way down: as long as the replicas keep up there is none, and fewer might not keep
up. So it never shrinks to where those that are left would be busy for more than 80 % of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..broker.load import Load
from .config import AutoscalingConfig

_BUSY = 0.8
_MEMORY_S = 1.0
"""How far back the average of what is in progress reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How many replicas there should be, and since when the load has called for another number."""

    replicas: int
    at_s: float = 0.0
    more_since_s: float | None = None
    least: int = 0
    """The least that was called for since then."""
    fewer_since_s: float | None = None
    most: int = 0
    """The most that was called for since then."""
    busy: float = 0.0
    """An average of what was in progress."""


def decide(config: AutoscalingConfig, concurrency: int, standing: Standing, load: Load, now_s: float) -> Standing:
    """Return the standing after ``load`` was seen at ``now_s``, a time that never runs backwards.

    ``concurrency`` is how many requests one replica holds at a time. A restarted controller begins with
    ``Standing(replicas=...)`` of what runs: it forgets how long it has waited, and nothing else.
    """
    elapsed_s = max(0.0, now_s - standing.at_s)
    share = 1.0 if standing.at_s == 0.0 else 1.0 - math.exp(-elapsed_s / _MEMORY_S)
    busy = standing.busy + share * (load.in_progress - standing.busy)
    standing = replace(standing, at_s=now_s, busy=busy)

    current = _clamped(config, standing.replicas)
    queue_wants = math.ceil(load.unsettled / config.target_queue_per_replica)
    if load.unsettled > 0:
        queue_wants = max(queue_wants, 1)
    busy_wants = math.ceil(busy / (_BUSY * concurrency) - 1e-9)
    wanted = _clamped(config, max(queue_wants, min(current, busy_wants)))
    if current == 0 and wanted > 0:
        # Somebody waits and nobody serves: no delay is for that.
        return _settled(standing, wanted)
    if wanted > current:
        since_s = now_s if standing.more_since_s is None else standing.more_since_s
        least = wanted if standing.more_since_s is None else min(standing.least, wanted)
        if now_s - since_s >= config.upscale_delay_s:
            return _settled(standing, least)
        return replace(standing, replicas=current, more_since_s=since_s, least=least, fewer_since_s=None, most=0)
    if wanted < current:
        since_s = now_s if standing.fewer_since_s is None else standing.fewer_since_s
        most = wanted if standing.fewer_since_s is None else max(standing.most, wanted)
        if now_s - since_s >= config.downscale_delay_s:
            return _settled(standing, most)
        return replace(standing, replicas=current, more_since_s=None, least=0, fewer_since_s=since_s, most=most)
    return _settled(standing, current)


def _settled(standing: Standing, replicas: int) -> Standing:
    return Standing(replicas=replicas, at_s=standing.at_s, busy=standing.busy)


def _clamped(config: AutoscalingConfig, replicas: int) -> int:
    return min(max(replicas, config.min_replicas), config.max_replicas)
