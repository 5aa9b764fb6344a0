"""Leases: keys with an expiry which prove that a replica or a proxy is alive, and which their owner renews.

`Lease` is that of a proxy. That of a replica also finds dead replicas: `broker/queue/group/replica_lease.py`.

A lease is renewed even while user code blocks the event loop: by a thread with a connection of its own. Only code that
holds the interpreter lock for longer than the lease does delays the renewal. In that case another replica redelivers
work that is still running, and the caller ignores the second reply.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url  # pyright: ignore[reportUnknownVariableType]
from redis.retry import Retry

from ..errors import BrokerUnavailable, ConfigError
from ..transport import outages
from ..transport.commands import Arg, Script
from ..transport.dial import GREETING, WrongServer, check_greeting
from ..transport.error_replies import NOT_PRIMARY, TEMPORARY, error_of
from ..transport.handshake import code_of, reason_of
from ..transport.sentinels.finder import BlockingPrimaryFinder
from ..transport.url import redis_options, sentinel_service, shown_url

log = logging.getLogger(__name__)

TTL_S = 2.0
RENEW_S = 0.5
assert RENEW_S * 2 < TTL_S, "one failed renewal must not lose the lease"

# Renews a lease. KEYS: the lease. ARGV: milliseconds until it expires. A script with the flag allow-oom, as a broker
# that is out of memory refuses SET: a proxy that serves must not count as dead for that.
_RENEW = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
""")


class LeaseConnection:
    """Runs the script of a lease on a connection of its own, and blocks meanwhile. It connects when it is first used.

    Args:
        url: of the broker.
        timeout_s: how long connecting, and the script, may take.
    """

    def __init__(self, url: str, timeout_s: float = TTL_S / 2) -> None:
        self._url = url
        self.shown_url = shown_url(url)
        self._options = redis_options(url, parse_url)  # pyright: ignore[reportUnknownArgumentType]
        self._options.update(protocol=2, client_name="penstock-lease", retry=Retry(NoBackoff(), 0))
        self._options.update(socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._redis = self._client()
        service = sentinel_service(url)
        self._finder = BlockingPrimaryFinder(service, timeout_s / 2) if service is not None else None
        self._primary: tuple[str, int] | None = None
        """The server that ``_redis`` leads to, where a sentinel named it."""

    def check_server(self) -> None:
        """Raise `ConfigError` if the server cannot be a broker: it is a node of a cluster, or a sentinel."""
        try:
            self._follow_primary()
            client: Any = self._redis  # its stubs have no types here
            check_greeting(client.execute_command(GREETING))
        except WrongServer as e:
            raise ConfigError(f"{self.shown_url} cannot be the broker: {e}") from None
        except redis.RedisError as e:
            log.debug("cannot see what kind of server %s is: %s", self.shown_url, e)  # `run` raises what matters

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run ``script``.

        Raises:
            BrokerUnavailable: the broker does not answer, rejects the login, or refuses writes at present.
            BrokerRefused: the broker answered with another error.
        """
        try:
            self._follow_primary()
            return cast(Any, self._redis).eval(script.text, len(keys), *keys, *args)
        except redis.ResponseError as e:
            code = code_of(e)
            if code in NOT_PRIMARY:
                self._redis.connection_pool.disconnect()  # the address may lead to the primary by now
                self._doubt_primary()
            if code in NOT_PRIMARY or code in TEMPORARY:
                raise BrokerUnavailable(self.shown_url, f"it refuses writes: {e}") from None
            message = f"{code} {e}" if code == "NOPERM" else f"ERR {e}"
            raise error_of(message, [b"EVAL", b"", b"1", keys[0].encode()], self._url) from None
        except redis.RedisError as e:
            self._doubt_primary()
            raise BrokerUnavailable(self.shown_url, reason_of(e)) from None

    def delete(self, key: str) -> None:
        """Delete a key. An unreachable broker is not an error."""
        with contextlib.suppress(redis.RedisError):
            self._follow_primary()
            self._redis.delete(key)

    def disconnect(self) -> None:
        """Close the connection. `run` connects again."""
        self._redis.connection_pool.disconnect()

    def close(self) -> None:
        """Close the connections to the broker and to its sentinels."""
        self.disconnect()
        if self._finder is not None:
            self._finder.close()

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
        self._key, self._ttl_ms, self._every_s = key, int(ttl_s * 1000), every_s
        self._connection = LeaseConnection(url, ttl_s / 2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def start(self) -> None:
        """Acquire the lease and renew it in the background.

        Raises:
            BrokerUnavailable: the broker does not answer, rejects the login, or refuses writes at present.
            BrokerRefused: the broker answered with another error.
            ConfigError: the server cannot be a broker: it is a node of a cluster, or a sentinel.
        """
        self._connection.check_server()
        self._renew()
        self._thread.start()

    def stop(self) -> None:
        """Stop renewing and delete the key. Blocks for a few seconds at most; an unreachable broker is not an error."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(self._ttl_ms / 1000)
        outages.report_ended(self._connection.shown_url, self, closing=True)
        self._connection.delete(self._key)
        self._connection.close()

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._renew()
            except Exception as e:  # of any kind: the next renewal may succeed
                outages.report_began(self._connection.shown_url, self, f"cannot renew the lease {self._key}: {e}")
            else:
                outages.report_ended(self._connection.shown_url, self)

    def _renew(self) -> None:
        self._connection.run(_RENEW, [self._key], [self._ttl_ms])
