"""The autoscaling policy: a pure function of the queue depth and of earlier decisions.

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

from ...broker.queue.load import QueueDepth
from ...broker.registry.records import AutoscalingSpec

_BUSY = 0.8
_MEMORY_S = 1.0
"""How far back the average of what is in progress reaches."""
_NEGLIGIBLE = 0.05
"""A smaller share of a replica's work is no reason to keep one: an average that fades is never quite nothing."""

Called = tuple[float, int]
"""When the load called for so many replicas for the last time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How many replicas there should be, and since when the load has called for another number."""

    replicas: int
    at_s: float = 0.0
    more_since_s: float | None = None
    least: int = 0
    """The least that was called for since then."""
    called: tuple[Called, ...] = ()
    """What was called for, but for what more was called for later: the first one is the most."""
    busy: float = 0.0
    """An average of what was in progress."""


def decide(config: AutoscalingSpec, concurrency: int, standing: Standing, load: QueueDepth, now_s: float) -> Standing:
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
    busy_wants = math.ceil(busy / (_BUSY * concurrency) - _NEGLIGIBLE)
    wanted = _clamped(config, max(queue_wants, min(current, busy_wants)))
    standing = replace(standing, replicas=current, called=_called(config, standing, current, wanted))
    if wanted > current:
        since_s = now_s if standing.more_since_s is None else standing.more_since_s
        least = wanted if standing.more_since_s is None else min(standing.least, wanted)
        # Where somebody waits and nobody serves: no delay is for that.
        if current > 0 and now_s - since_s < config.upscale_delay_s:
            return replace(standing, more_since_s=since_s, least=least)
        return replace(standing, replicas=least, more_since_s=None)
    most = standing.called[0][1]
    return replace(standing, replicas=min(current, most), more_since_s=None)


def _called(config: AutoscalingSpec, standing: Standing, current: int, wanted: int) -> tuple[Called, ...]:
    """Return what was called for in the last ``downscale_delay_s``, ``wanted`` being what is called for now."""
    now_s = standing.at_s
    before = standing.called or ((now_s, current),)
    lately = [(at_s, count) for at_s, count in before if count > wanted and now_s - at_s < config.downscale_delay_s]
    return (*lately, (now_s, wanted))


def _clamped(config: AutoscalingSpec, replicas: int) -> int:
    return min(max(replicas, config.min_replicas), config.max_replicas)
