"""Traffic: the choice of a backend from the endpoint's weights and the shard key.

With a shard key the choice is weighted rendezvous hashing (highest random weight): each backend draws a score from a
hash of its tag and the key, and the highest wins. A change of weights changes only scores of the backends whose weights
changed, so it moves no more keys than it must, and the same key maps to the same backend in every process.
(Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005: the score is -weight / ln(hash).)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

_SCALE = 2.0**-53


def choose(traffic: Mapping[str, float], shard_key: str | None, random: float) -> str | None:
    """Return the tag of the backend that gets the request; None if no backend has a weight above 0.

    Args:
        traffic: backend tag to weight, not negative; the weights need not sum to 1.
        shard_key: requests with the same key go to the same backend; None goes by ``random``.
        random: at least 0 and below 1.
    """
    if len(traffic) == 1:
        ((tag, weight),) = traffic.items()
        return tag if weight > 0 else None
    if shard_key is not None:
        return rendezvous(traffic, shard_key)
    left = random * sum(traffic.values())
    chosen = None
    for tag, weight in traffic.items():
        if weight > 0:
            chosen = tag
            if left < weight:
                break
            left -= weight
    return chosen


def rendezvous(traffic: Mapping[str, float], shard_key: str) -> str | None:
    """Return the backend that ``shard_key`` maps to, each with the probability of its weight; None if all are 0."""
    best, best_score = None, -1.0
    for tag in sorted(traffic):
        weight = traffic[tag]
        if weight > 0 and (score := -weight / math.log(_uniform(tag, shard_key))) > best_score:
            best, best_score = tag, score
    return best


def _uniform(tag: str, shard_key: str) -> float:
    """Return a number above 0 and below 1 that depends on both names alone."""
    # The length keeps ("a", "bc") apart from ("ab", "c").
    key = f"{len(tag)}:{tag}{shard_key}".encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return ((drawn >> 11) + 0.5) * _SCALE
