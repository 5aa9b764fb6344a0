"""The lease of a replica, and the turns in which the replicas of a backend look for dead ones.

The lease is a key with an expiry. While it exists, no other replica redelivers the entries of its owner. Each renewal
also takes part in a lottery: of all replicas of a backend, the first to renew when the last look is `SWEEP_S` ago looks
for entries to redeliver, and sends what it finds to the others. So the cost of looking does not grow with the square
of the number of replicas, and no death can take away the one that looks.

A lease also expires when the broker takes no renewals: it refuses writes, it hangs, it is restarted, its clock jumps.
Then the leases of all replicas expire together, and an expired lease proves nothing. So a renewal returns whether the
lease was still held, and a replica that has not held its own for `TTL_S` without a gap redelivers no entries
(`ReplicaLease.is_trusted`): the other replicas may have been unable to renew theirs. A lease that the controller marks
as `DROPPED`, because Ray reported the death, is proof at any time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from ...errors import BrokerFull, BrokerRefused, BrokerUnavailable
from ...transport import outages
from ...transport.clock import GRID_MS, on_grid
from ...transport.commands import Script
from ...transport.url import shown_url
from ..leases import RENEW_S, TTL_S, LeaseConnection
from .member import Member

log = logging.getLogger(__name__)

SWEEP_S = 0.4
"""Least time between two looks for dead replicas of one backend."""

DROPPED = "dropped"
"""The value of the lease of a replica that is known to be dead."""

_GAP_S = 2 * RENEW_S
"""Without a renewal for longer than this, the lease of another replica may have expired for the same reason."""
assert 2 * _GAP_S <= TTL_S, "no lease may expire without a death between two unbroken renewals of another"

_GUARD_AFTER_S = 1.5 * RENEW_S
"""The guard renews a lease that the event loop has not renewed for so long."""
assert _GUARD_AFTER_S < _GAP_S, "the guard must leave no gap"

_GUARD_RETRY_S = 0.25
_GUARD_IDLE_S = 30.0
"""The guard's connection closes when it has not been used for so long."""

_TTL_MS, _SWEEP_MS = int(TTL_S * 1000), int(SWEEP_S * 1000)

# Renews a lease at a broker that is out of memory: it refuses a plain SET, and a replica that serves must not count as
# dead for that. KEYS: the lease, and perhaps the turn. ARGV: the value of the lease. Returns the former value, and
# whether it is this replica's turn to look for dead ones.
_RENEW = Script(f"""#!lua flags=allow-oom
local former = redis.call('SET', KEYS[1], ARGV[1], 'GET', 'PX', {_TTL_MS})
return {{former, KEYS[2] and redis.call('SET', KEYS[2], '', 'NX', 'PX', {_SWEEP_MS}) and 1 or 0}}
""")

EXPIRY_CHECKER = f"""
local function expiry_checker(leases, me, is_trusted)
  local trusts_expiry = is_trusted == '1' and redis.call('PTTL', leases .. me) >= {_TTL_MS - int(_GAP_S * 1000)}
  return function(lease)
    return lease == '{DROPPED}' or (trusts_expiry and not lease)
  end
end
"""
"""A Lua function. Its arguments are the beginning of the keys of leases, a replica, and its
`ReplicaLease.is_trusted`. It returns a function that tells whether the lease of another replica, given by its value,
has expired, so that the first replica may redeliver its entries.
"""


class ReplicaLease:
    """The lease of one replica.

    The event loop renews it over the connection of the replica. While user code blocks the loop, a thread renews it
    over a connection of its own (the guard).
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        keys, backend = member.keys, member.backend
        self._key, self._turn = keys.alive(backend, member.replica), keys.sweep_turn(backend)
        self._value = secrets.token_hex(8).encode()
        self._shown_url = shown_url(member.commands.url)
        self._held_since_s: float | None = None
        self._was_acquired = False
        self.losses = 0
        """How often the lease had expired, or was dropped, when it was renewed."""
        self._confirmed_s = monotonic()
        """When the last renewal was confirmed."""
        self._is_in_flight = self._is_memory_full = False
        self._timer: asyncio.TimerHandle | None = None
        self._on_turn: Callable[[], None] | None = None
        self._is_looking: Callable[[], bool] = lambda: False
        self._guard_connection = LeaseConnection(member.commands.url)
        self._ended = threading.Event()
        self._guard = threading.Thread(target=self._keep_guarding, name="lease guard", daemon=True)
        member.commands.on_reconnect(self._distrust)

    @property
    def held_since_s(self) -> float | None:
        """Since when the lease has been held without a gap, by ``time.monotonic``; None while it is not held."""
        return self._held_since_s

    @property
    def is_trusted(self) -> bool:
        """Whether the lease has been held for so long that the expired lease of another replica proves its death."""
        now_s = monotonic()
        held_since_s = self._held_since_s
        return held_since_s is not None and now_s - held_since_s >= TTL_S and now_s - self._confirmed_s <= _GAP_S

    async def renew(self) -> None:
        """Renew the lease once.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or refuses writes.
            BrokerRefused: the broker answered with another error, such as a missing permission.
        """
        former, _ = await self._member.commands.run_script(_RENEW, [self._key], [self._value], prompt=True)
        self._confirm(former)

    async def start(self, on_turn: Callable[[], None], is_looking: Callable[[], bool] = lambda: False) -> None:
        """Acquire the lease and renew it in the background, until `stop`.

        Args:
            on_turn: called on the event loop when it is this replica's turn to look for dead ones.
            is_looking: returns whether the look of an earlier turn goes on. Meanwhile the turns are for others, as this
                look may never end.

        Raises:
            BrokerUnavailable, BrokerRefused: as by `renew`.
        """
        await self.renew()
        self._on_turn, self._is_looking = on_turn, is_looking
        self._schedule()
        self._guard.start()

    async def stop(self) -> None:
        """Stop renewing, and delete the lease. An unreachable broker is not an error: the lease expires."""
        self._ended.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._guard.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._guard.join, TTL_S)
        outages.report_ended(self._shown_url, self, closing=True)
        self._guard_connection.close()
        try:
            if self._member.commands.connected:
                await self._member.commands.send("DEL", self._key, repeat=True, prompt=True)
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot delete the lease of replica %r: %s", self._member.replica, e)

    def _confirm(self, former: bytes | None) -> None:
        now_s = monotonic()
        if former != self._value and self._was_acquired:
            self.losses += 1
        if former != self._value or self._held_since_s is None or now_s - self._confirmed_s > _GAP_S:
            self._held_since_s = now_s
        self._was_acquired = True
        self._confirmed_s = now_s

    async def _distrust(self) -> None:
        # This may be another server, with older leases of the others.
        self._held_since_s = None

    # -- on the event loop

    def _schedule(self) -> None:
        # Together with other replicas. Random, so that the turns do not always fall to the same one.
        longest_s = RENEW_S - random.choice((0.0, GRID_MS / 1000))
        delay_s = on_grid(longest_s, self._member.commands.now_ms())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._beat)

    def _beat(self) -> None:
        self._schedule()
        if self._is_in_flight:
            return
        self._is_in_flight = True
        commands = self._member.commands
        if self._is_memory_full:
            keys = [self._key] if self._is_looking() else [self._key, self._turn]
            commands.post_script(self._on_script, _RENEW, keys, [self._value], prompt=True)
            return
        # Plain commands: they cost the broker a fifth of the time of a script.
        commands.post(self._on_renewed, "SET", self._key, self._value, "GET", "PX", _TTL_MS, prompt=True)
        if not self._is_looking():
            commands.post(self._on_turn_asked, "SET", self._turn, "", "NX", "PX", _SWEEP_MS, prompt=True)

    def _on_script(self, result: Any) -> None:
        self._is_memory_full = False
        self._on_renewed(result if isinstance(result, Exception) else result[0])
        if not isinstance(result, Exception) and result[1]:
            self._on_turn_asked(result)

    def _on_renewed(self, result: Any) -> None:
        self._is_in_flight = False
        if isinstance(result, BrokerFull):
            self._is_memory_full = True
            if self._timer is not None and not self._ended.is_set():
                self._timer.cancel()
                self._beat()
        elif isinstance(result, BrokerUnavailable):
            log.debug("cannot renew the lease of replica %r: %s", self._member.replica, result)  # logged as an outage
        elif isinstance(result, Exception):
            self._report_failure(result)
        else:
            self._confirm(result)
            outages.report_ended(self._shown_url, self)

    def _on_turn_asked(self, result: Any) -> None:
        if result and not isinstance(result, Exception) and self._on_turn is not None and not self._ended.is_set():
            self._on_turn()

    # -- on the thread of the guard

    def _keep_guarding(self) -> None:
        pause_s, used_s = _GUARD_AFTER_S, -_GUARD_IDLE_S
        while not self._ended.wait(pause_s):
            now_s = monotonic()
            pause_s = self._confirmed_s + _GUARD_AFTER_S - now_s
            if pause_s > 0:
                if 0 <= used_s <= now_s - _GUARD_IDLE_S:
                    self._guard_connection.disconnect()
                    used_s = -_GUARD_IDLE_S
                continue
            used_s, pause_s = now_s, _GUARD_RETRY_S
            try:
                former, _ = self._guard_connection.run(_RENEW, [self._key], [self._value])
            except BrokerUnavailable as e:
                log.debug("cannot renew the lease of replica %r: %s", self._member.replica, e)  # logged as an outage
            except Exception as e:  # of any kind: the next renewal may succeed
                self._report_failure(e)
            else:
                self._confirm(former)
                outages.report_ended(self._shown_url, self)

    def _report_failure(self, error: Exception) -> None:
        outages.report_began(self._shown_url, self, f"cannot renew the lease of {self._member.replica}: {error}")
