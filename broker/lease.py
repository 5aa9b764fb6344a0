"""A replica's sign of life, and a proxy's: a key that lapses unless it is renewed.

It is renewed from a thread of its own over a connection of its own, so that neither user code that blocks the loop nor
a long reply can let it lapse. What holds the interpreter's lock for longer than the lease does: then another replica
takes over work that is still running, and the caller drops the second answer.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url  # pyright: ignore[reportUnknownVariableType]
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from .address import redis_options, shown_url
from .errors import BrokerUnavailable
from .link import error_of, reason_of

log = logging.getLogger(__name__)

# A broker that is out of memory refuses SET, and a replica that serves must not count as dead for that.
_RENEW = """#!lua flags=allow-oom
return redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
"""


class Lease:
    """Keeps ``key`` alive from `start` to `stop`."""

    def __init__(self, url: str, key: str, *, ttl_s: float = 2.0, every_s: float = 0.5) -> None:
        assert every_s * 2 < ttl_s, "one lost renewal must not cost the lease"
        self._url, self._key, self._ttl_ms, self._every_s = url, key, int(ttl_s * 1000), every_s
        options = redis_options(url, parse_url)  # pyright: ignore[reportUnknownArgumentType]
        options.update(protocol=2, client_name="penstock-lease", retry=Retry(NoBackoff(), 0))
        options.update(socket_timeout=ttl_s / 2, socket_connect_timeout=ttl_s / 2)
        self._redis = redis.Redis(connection_pool=redis.ConnectionPool(**options))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def start(self) -> None:
        """Take the lease and keep it.

        Raises:
            BrokerUnavailable: the broker does not answer, or turned us away.
            BrokerRefused: it answered with an error.
        """
        self._take()
        self._thread.start()

    def stop(self) -> None:
        """Let go of it, at once. Blocks for a few seconds at most; a broker that is gone is no error."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(self._ttl_ms / 1000)
        with contextlib.suppress(redis.RedisError):
            self._redis.delete(self._key)
        self._redis.connection_pool.disconnect()

    def _renew(self) -> None:
        lost = False
        while not self._ended.wait(self._every_s):
            try:
                self._take()
                lost = False
            except Exception as e:  # whatever it is, the next renewal may go through
                if not lost:
                    log.warning("cannot renew the lease %s: %s", self._key, e)
                lost = True

    def _take(self) -> None:
        try:
            self._redis.eval(_RENEW, 1, self._key, self._ttl_ms)
        except redis.ResponseError as e:
            # Of which redis-py has cut off the first word.
            said = f"{'NOPERM' if isinstance(e, NoPermissionError) else 'ERR'} {e}"
            raise error_of(said, [b"EVAL", b"", b"1", self._key.encode()], self._url) from None
        except redis.RedisError as e:
            raise BrokerUnavailable(shown_url(self._url), reason_of(e)) from None
