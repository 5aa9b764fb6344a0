"""Names of all Redis keys of an instance.

The keys that one script uses share a hash tag, and so a slot of a Redis Cluster
(https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags).
"""

from __future__ import annotations

import re
from urllib.parse import quote

from ..errors import ConfigError

PREFIX = "penstock:"
"""Every key begins with it."""

_NAME = re.compile(r"[A-Za-z0-9_.\-#]{1,128}")
_SECRET_KEY = re.compile(r"\{(?P<tag>[^{}]*)\}:(?P<kind>replies|body|kept|result|key)(?::.*)?", re.DOTALL)
_CALLER = re.compile(r"[0-9a-f]{12}|.*[@:].*", re.DOTALL)
"""Ids of callers. A backend may have such a name too, but only by chance."""


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it can be part of a key; ``kind``, such as "a backend", names it in errors.

    Raises:
        TypeError: it is not a string.
        ConfigError: it is not 1 to 128 characters, each a letter, a digit or one of ``_ . - #``.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a str, not {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{kind} {name!r} must be 1 to 128 letters, digits, '_', '.', '-' or '#'")
    return name


def shown_key(key: str) -> str:
    """Return a key for logs and messages, without the ids of callers and calls that it contains.

    >>> shown_key("penstock:default:{web@1f2e}:replies"), shown_key("penstock:default:{f}:body:c0ffee")
    ('penstock:default:{web@...}:replies', 'penstock:default:{f}:body:...')
    """
    return _SECRET_KEY.sub(_without_secrets, key)


def _without_secrets(found: re.Match[str]) -> str:
    tag, kind = found["tag"], found["kind"]
    if kind == "replies" or _CALLER.fullmatch(tag):
        user, at, _ = tag.partition("@")
        tag = f"{user}@..." if at else "..."
    return f"{{{tag}}}:{kind}" + ("" if kind == "replies" else ":...")


class Keys:
    """The keys of one instance."""

    def __init__(self, instance: str) -> None:
        self.instance = check_name("an instance", instance)
        self._root = f"{PREFIX}{instance}:"
        registry = self._root + "{registry}:"
        self.version = registry + "version"
        self.backends = registry + "backends"
        self.endpoints = registry + "endpoints"
        self.feed = registry + "feed"
        self.owner = registry + "owner"
        self.settings = registry + "settings"
        self.metrics_owner = registry + "metrics-owner"
        self.proxy_metrics = registry + "proxy-metrics"
        self.pattern = self._root + "*"
        """A pattern for ``SCAN MATCH`` with all keys of this instance, and of no other."""

    def code(self, digest: str) -> str:
        """A string: a backend's code, or files that belong to it, by their SHA-256."""
        return f"{self._root}{{registry}}:code:{digest}"

    def reports(self, kind: str) -> str:
        """A hash: the reports of all processes of one ``kind``, such as ``replicas``."""
        return f"{self._root}{{registry}}:reports:{kind}"

    def of_backend(self, backend: str) -> str:
        """A pattern for ``SCAN MATCH`` with all keys of one backend."""
        return f"{self._root}{{{backend}}}:*"

    def requests(self, backend: str) -> str:
        """The request stream of a backend."""
        return f"{self._root}{{{backend}}}:requests"

    def batch(self, backend: str) -> str:
        """The request stream of a backend for batch producers."""
        return f"{self._root}{{{backend}}}:requests:batch"

    def sizes(self, backend: str) -> str:
        """A hash: the bytes of the unsettled requests that are not small; see ``broker/queue/queued_bytes.py``."""
        return f"{self._root}{{{backend}}}:sizes"

    def dead(self, backend: str) -> str:
        """The stream of a backend's dead letters."""
        return f"{self._root}{{{backend}}}:dead"

    def done(self, backend: str) -> str:
        """A hash: how many requests a backend's replicas answered, and their times (``broker/queue/stats.py``)."""
        return f"{self._root}{{{backend}}}:done"

    def calls(self, backend: str) -> str:
        """A hash: how many requests had no reply, as callers saw it (``broker/queue/counts/caller_counts.py``)."""
        return f"{self._root}{{{backend}}}:calls"

    def alive(self, backend: str, replica: str) -> str:
        """The lease of a replica; ``alive(backend, "")`` is the common prefix of a backend's."""
        return f"{self._root}{{{backend}}}:alive:{replica}"

    def sweep_turn(self, backend: str) -> str:
        """Exists while a replica of the backend has looked for dead ones a moment ago."""
        return f"{self._root}{{{backend}}}:alive::turn"

    def tidy_turn(self, backend: str) -> str:
        """Exists while a replica of the backend has deleted dead consumers a short time ago."""
        return f"{self._root}{{{backend}}}:alive::tidied"

    def proxy_alive(self, proxy: str) -> str:
        """The lease of a proxy."""
        return f"{self._root}{{registry}}:alive-proxy:{proxy}"

    def history(self, backend: str, entry: str) -> str:
        """A list: the deliveries of an entry (by its ref) after which the replica died."""
        return f"{self._root}{{{backend}}}:history:{entry}"

    def streamed(self, backend: str, entry: str) -> str:
        """Exists if the reply to an entry (by its ref) has begun to stream, so that it must not run again."""
        return f"{self._root}{{{backend}}}:streamed:{entry}"

    def retry(self, backend: str, entry: str) -> str:
        """A string: the attempts of an entry (by its ref) whose code raised; see ``broker/queue/group/attempts.py``."""
        return f"{self._root}{{{backend}}}:retry:{entry}"

    def body(self, backend: str, request: str) -> str:
        """The claim check with a request's large body, by the id of its call."""
        return f"{self._root}{{{backend}}}:body:{request}"

    def signals(self, backend: str) -> str:
        """The stream of signals to all replicas of a backend; see ``broker/queue/signals.py``."""
        return f"{self._root}{{{backend}}}:signals"

    def kept(self, backend: str, request: str) -> str:
        """A hash: the record of a kept request, by its id; see ``broker/results/``."""
        return f"{self._root}{{{backend}}}:kept:{request}"

    def result(self, backend: str, request: str) -> str:
        """A hash: the result of a kept request."""
        return f"{self._root}{{{backend}}}:result:{request}"

    def result_body(self, backend: str, request: str) -> str:
        """The claim check with the large body of a result."""
        return f"{self._root}{{{backend}}}:result:{request}:body"

    def idempotency_key(self, backend: str, digest: str) -> str:
        """A string: the id of the kept request that holds an idempotency key, by the digest of the key."""
        return f"{self._root}{{{backend}}}:key:{digest}"

    def results_space(self, backend: str) -> str:
        """A hash: the bytes of a backend's kept requests and results; see ``broker/results/space.py``."""
        return f"{self._root}{{{backend}}}:results"

    def submitted(self, backend: str) -> str:
        """A hash: the numbers of a backend's kept requests; see ``broker/results/counts.py``."""
        return f"{self._root}{{{backend}}}:submitted"

    def key_backend(self, digest: str) -> str:
        """A string: the backend that holds an idempotency key, by the digest of the key."""
        return f"{self._root}{{key:{digest}}}:backend"

    def job(self, caller: str) -> str:
        """A string: the record of a batch job. ``caller`` is the id whose reply stream has its results."""
        return f"{self._root}{{{caller}}}:job"

    def job_input(self, caller: str) -> str:
        """The stream of hashes of the input rows of a batch job."""
        return f"{self._root}{{{caller}}}:job:input"

    def job_owner(self, caller: str) -> str:
        """The ownership of a batch job: the lease of its producer."""
        return f"{self._root}{{{caller}}}:owner"

    @staticmethod
    def job_name(job: str) -> str:
        """The caller name of a batch job. It contains a colon, as no backend's name does."""
        return f"job:{job}"

    @staticmethod
    def caller(user: str, name: str) -> str:
        """The id of a caller. It begins with its Redis user, so that an ACL can limit each user to its own replies.

        The user is percent-encoded: it ends at the first ``@`` and contains no brace, colon or wildcard.

        >>> Keys.caller("web", "1f2e"), Keys.caller("a@b*", "job:1"), Keys.caller("", "1f2e")
        ('web@1f2e', 'a%40b%2A@job:1', '1f2e')
        """
        return f"{quote(user, safe='')}@{name}" if user else name

    def replies(self, caller: str) -> str:
        """The reply stream of a caller."""
        return f"{self._root}{{{caller}}}:replies"

    def reply_body(self, caller: str, request: str) -> str:
        """The claim check with a reply's large body, by the id of its call."""
        return f"{self._root}{{{caller}}}:body:{request}"
