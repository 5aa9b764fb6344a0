"""Autoscaling policy: how many replicas a backend should have, from its queue depth and earlier decisions. Pure.

It scales up when the load has required more replicas during all of ``upscale_delay_s``, to the smallest number that it
required in that time. It scales down when the load has required fewer during all of ``downscale_delay_s``, to the
largest number that it required in that time. So a short peak does not start replicas, a short lull does not stop any,
and a load that swings faster than the delays changes nothing.

The queue alone is a poor reason to scale down: as long as the replicas keep up it is empty, and fewer might not keep
up. So the policy never scales down to where the remaining replicas would be busy for more than 80 % of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...broker.queue.counts.queue_depth import QueueDepth
from ...broker.registry.records import AutoscalingSpec

_MAX_UTILISATION = 0.8
_AVERAGING_S = 1.0
"""Time constant of the moving average of requests in progress."""

_NEGLIGIBLE = 0.05
"""Share of one replica's work that does not justify keeping it: a moving average never quite reaches zero."""

Demand = tuple[float, int]
"""A time, and the number of replicas that the load required then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """The state of the policy for one backend between two decisions."""

    replicas: int
    """The number that was decided last."""
    at_s: float = 0.0
    """The time of the last decision."""
    more_since_s: float | None = None
    """Since when the load has required more replicas; None if it does not."""
    least_demand: int = 0
    """The smallest number that it required since then."""
    recent_demand: tuple[Demand, ...] = ()
    """Demands within the downscale delay, without those that a later one exceeded: the first is the largest."""
    in_progress: float = 0.0
    """Moving average of the requests in progress."""


def decide(
    config: AutoscalingSpec, concurrency: int, state: ScalingState, depth: QueueDepth, now_s: float
) -> ScalingState:
    """Return the next state, whose ``replicas`` is the decision.

    Args:
        config: bounds, delays and target.
        concurrency: the requests that one replica holds at a time.
        state: the previous state. A restarted controller begins with ``ScalingState(replicas=...)`` of what runs; only
            the time that it has already waited is lost.
        depth: the requests of the backend now.
        now_s: the present time, which never goes backwards.
    """
    elapsed_s = max(0.0, now_s - state.at_s)
    weight = 1.0 if state.at_s == 0.0 else 1.0 - math.exp(-elapsed_s / _AVERAGING_S)
    in_progress = state.in_progress + weight * (depth.in_progress - state.in_progress)
    state = replace(state, at_s=now_s, in_progress=in_progress)

    current = _clamp(config, state.replicas)
    for_queue = math.ceil(depth.unsettled / config.target_queue_per_replica)
    if depth.unsettled > 0:
        for_queue = max(for_queue, 1)
    for_utilisation = math.ceil(in_progress / (_MAX_UTILISATION * concurrency) - _NEGLIGIBLE)
    demand = _clamp(config, max(for_queue, min(current, for_utilisation)))
    state = replace(state, replicas=current, recent_demand=_recent_demand(config, state, current, demand))
    if demand > current:
        since_s = now_s if state.more_since_s is None else state.more_since_s
        least = demand if state.more_since_s is None else min(state.least_demand, demand)
        # Requests that wait for a backend without any replica do not wait for the delay as well.
        if current > 0 and now_s - since_s < config.upscale_delay_s:
            return replace(state, more_since_s=since_s, least_demand=least)
        return replace(state, replicas=least, more_since_s=None)
    largest = state.recent_demand[0][1]
    return replace(state, replicas=min(current, largest), more_since_s=None)


def _recent_demand(config: AutoscalingSpec, state: ScalingState, current: int, demand: int) -> tuple[Demand, ...]:
    """Return the demands of the last ``downscale_delay_s`` with the present one, ``demand``, at their end."""
    now_s = state.at_s
    before = state.recent_demand or ((now_s, current),)
    larger = [(at_s, count) for at_s, count in before if count > demand and now_s - at_s < config.downscale_delay_s]
    return (*larger, (now_s, demand))


def _clamp(config: AutoscalingSpec, replicas: int) -> int:
    return min(max(replicas, config.min_replicas), config.max_replicas)
