"""A replica's sign of life: a key that lapses unless it is renewed.

It is renewed from a thread of its own over a connection of its own, so that neither user code that blocks the loop nor a
long reply can let it lapse. What holds the interpreter's lock for longer than the lease does: then another replica takes over
work that is still running, and the caller drops the second answer.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)


class Lease:
    """Keeps ``key`` alive from `start` to `stop`."""

    def __init__(self, url: str, key: str, *, ttl_s: float = 2.0, every_s: float = 0.5) -> None:
        assert every_s * 2 < ttl_s, "one lost renewal must not cost the lease"
        self._key, self._ttl_ms, self._every_s = key, int(ttl_s * 1000), every_s
        self._redis = redis.Redis.from_url(
            url, protocol=2, socket_timeout=ttl_s / 2, socket_connect_timeout=ttl_s / 2, retry=Retry(NoBackoff(), 0)
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def start(self) -> None:
        """Take the lease and keep it. Raises ``redis.exceptions.RedisError`` if the broker does not answer."""
        self._redis.set(self._key, b"1", px=self._ttl_ms)
        self._thread.start()

    def stop(self) -> None:
        """Let go of it, at once. Blocks for at most a second or two; a broker that is gone is no error."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(self._ttl_ms / 1000)
        with contextlib.suppress(redis.RedisError):
            self._redis.delete(self._key)
        self._redis.close()

    def _renew(self) -> None:
        lost = False
        while not self._ended.wait(self._every_s):
            try:
                self._redis.set(self._key, b"1", px=self._ttl_ms)
                lost = False
            except redis.RedisError as e:
                if not lost:
                    log.warning("cannot renew the lease %s: %s", self._key, e)
                lost = True
