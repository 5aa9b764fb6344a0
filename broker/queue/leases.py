"""Leases: keys with an expiry that prove that a replica or a proxy is alive.

A lease is renewed by a thread with a connection of its own. Neither user code that blocks the event loop nor a long
reply delays the renewal; only code that holds the interpreter lock for longer than the lease does. In that case another
replica redelivers work that is still running, and the caller ignores the second reply.

A lease also expires when the broker takes no renewals: it refuses writes, it hangs, it is restarted. Then the leases of
all replicas expire together, and an expired lease proves nothing. So the value of a lease is the time since when it has
been renewed without a gap, and the time of the last renewal, both by the broker's clock. A replica whose own lease has
a gap within the last `TTL_S` seconds redelivers no entries: the other replicas may have been unable to renew their
leases (`IS_EXPIRED`). A lease that the controller marks as `DROPPED`, because Ray reported the death, is proof at any
time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url  # pyright: ignore[reportUnknownVariableType]
from redis.retry import Retry

from ..errors import BrokerUnavailable, ConfigError
from ..transport import outages
from ..transport.dial import GREETING, WrongServer, check_greeting
from ..transport.error_replies import NOT_PRIMARY, TEMPORARY, error_of
from ..transport.handshake import code_of, reason_of
from ..transport.sentinels.finder import BlockingPrimaryFinder
from ..transport.url import redis_options, sentinel_service, shown_url

log = logging.getLogger(__name__)

TTL_S = 2.0
RENEW_S = 0.5
_GAP_MS = int(2 * RENEW_S * 1000)
"""Without a renewal for longer than this, the lease of another replica may have expired for the same reason."""
assert 2 * _GAP_MS <= TTL_S * 1000, "no lease may expire without a death between two unbroken renewals of another"

DROPPED = "dropped"
"""The value of the lease of a replica that is known to be dead."""

# Renews a lease. KEYS: the lease. ARGV: milliseconds until it expires. Returns 1 if there was none. A script with the
# flag allow-oom, as a broker that is out of memory refuses SET: a replica that serves must not count as dead for that.
_RENEW = f"""#!lua flags=allow-oom
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local since, last = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%d+)$')
local was_lost = not since
if not since or now - last > {_GAP_MS} then since = now end
redis.call('SET', KEYS[1], string.format('%.0f %.0f', since, now), 'PX', ARGV[1])
return was_lost and 1 or 0
"""

IS_EXPIRED = f"""
local function expiry_checker(leases, me)
  local now = redis.call('TIME')
  now = now[1] * 1000 + math.floor(now[2] / 1000)
  local mine = redis.call('GET', leases .. me)
  local since, last = string.match(mine or '', '^(%d+) (%d+)$')
  local is_unbroken = mine and (not since or (now - last <= {_GAP_MS} and now - since >= {int(TTL_S * 1000)}))
  return function(name)
    local lease = redis.call('GET', leases .. name)
    return lease == '{DROPPED}' or (is_unbroken and not lease)
  end
end
"""
"""A Lua function. Its arguments are the beginning of the keys of leases, and a replica. It returns a function that
tells whether the lease of another replica, given by its name, has expired, so that the first replica may redeliver its
entries. A lease of an earlier release, which has no times, counts as unbroken.
"""


class Lease:
    """Renews ``key`` from `start` until `stop`.

    Args:
        url: of the broker.
        key: of the lease.
        ttl_s: seconds after which the key expires when it is not renewed.
        every_s: seconds between renewals; less than half of ``ttl_s``, so that one failure does not lose the lease.
    """

    def __init__(self, url: str, key: str, *, ttl_s: float = TTL_S, every_s: float = RENEW_S) -> None:
        assert every_s * 2 < ttl_s, "one failed renewal must not lose the lease"
        self._url, self._key, self._ttl_ms, self._every_s = url, key, int(ttl_s * 1000), every_s
        self._shown_url = shown_url(url)
        self._options = redis_options(url, parse_url)  # pyright: ignore[reportUnknownArgumentType]
        self._options.update(protocol=2, client_name="penstock-lease", retry=Retry(NoBackoff(), 0))
        self._options.update(socket_timeout=ttl_s / 2, socket_connect_timeout=ttl_s / 2)
        self._redis = self._client()
        service = sentinel_service(url)
        self._finder = BlockingPrimaryFinder(service, ttl_s / 4) if service is not None else None
        self._primary: tuple[str, int] | None = None
        """The server that ``_redis`` leads to, where a sentinel named it."""
        self.losses = 0
        """How often it had expired when it was renewed."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def start(self) -> None:
        """Acquire the lease and renew it in the background.

        Raises:
            BrokerUnavailable: the broker does not answer, rejects the login, or refuses writes at present.
            BrokerRefused: the broker answered with another error.
            ConfigError: the server cannot be a broker: it is a node of a cluster, or a sentinel.
        """
        self._check_server()
        self._renew()
        self._thread.start()

    def stop(self) -> None:
        """Stop renewing and delete the key. Blocks for a few seconds at most; an unreachable broker is not an error."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(self._ttl_ms / 1000)
        outages.report_ended(self._shown_url, self, closing=True)
        with contextlib.suppress(redis.RedisError):
            self._follow_primary()
            self._redis.delete(self._key)
        self._redis.connection_pool.disconnect()
        if self._finder is not None:
            self._finder.close()

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._renew()
            except Exception as e:  # of any kind: the next renewal may succeed
                outages.report_began(self._shown_url, self, f"cannot renew the lease {self._key}: {e}")
            else:
                outages.report_ended(self._shown_url, self)

    def _renew(self) -> None:
        try:
            self._follow_primary()
            if self._redis.eval(_RENEW, 1, self._key, self._ttl_ms) == 1 and self._thread.ident is not None:
                self.losses += 1
        except redis.ResponseError as e:
            code = code_of(e)
            if code in NOT_PRIMARY:
                self._redis.connection_pool.disconnect()  # the address may lead to the primary by now
                self._doubt_primary()
            if code in NOT_PRIMARY or code in TEMPORARY:
                raise BrokerUnavailable(self._shown_url, f"it refuses writes: {e}") from None
            message = f"{code} {e}" if code == "NOPERM" else f"ERR {e}"
            raise error_of(message, [b"EVAL", b"", b"1", self._key.encode()], self._url) from None
        except redis.RedisError as e:
            self._doubt_primary()
            raise BrokerUnavailable(self._shown_url, reason_of(e)) from None

    def _check_server(self) -> None:
        try:
            self._follow_primary()
            client: Any = self._redis  # its stubs have no types here
            check_greeting(client.execute_command(GREETING))
        except WrongServer as e:
            raise ConfigError(f"{self._shown_url} cannot be the broker: {e}") from None
        except redis.RedisError as e:
            log.debug("cannot see what kind of server %s is: %s", self._shown_url, e)  # `_renew` raises what matters

    def _follow_primary(self) -> None:
        """Connect anew if the sentinels, where there are any, name another primary than before."""
        if self._finder is None:
            return
        try:
            primary = self._finder.find()
        except redis.RedisError:
            if self._primary is None:
                raise
            return  # silent sentinels prove nothing: the primary may be well
        if primary != self._primary:
            self._primary = self._options["host"], self._options["port"] = primary
            self._redis.connection_pool.disconnect()
            self._redis = self._client()

    def _doubt_primary(self) -> None:
        if self._finder is not None:
            self._finder.doubt()

    def _client(self) -> redis.Redis:
        return redis.Redis(connection_pool=redis.ConnectionPool(**self._options))
