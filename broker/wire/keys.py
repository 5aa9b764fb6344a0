"""The names of all keys.

What one script touches shares a hash tag, and with it a slot of a Redis Cluster
(https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags).
"""

from __future__ import annotations

import re
from urllib.parse import quote

from ..errors import ConfigError

PREFIX = "penstock:"
"""Every key begins with it."""

_NAME = re.compile(r"[A-Za-z0-9_.\-#]{1,128}")
_SECRET_KEY = re.compile(r"\{(?P<tag>[^{}]*)\}:(?P<kind>replies|body)(?::.*)?", re.DOTALL)
_CALLER = re.compile(r"[0-9a-f]{12}|.*[@:].*", re.DOTALL)
"""The id of a caller, which no name of a backend is but by chance."""


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it can be part of a key.

    Raises:
        TypeError: it is not a string.
        ConfigError: it is empty, longer than 128 characters, or holds other than letters, digits and ``_ . - #``.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a str, not {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{kind} {name!r} must be 1 to 128 letters, digits, '_', '.', '-' or '#'")
    return name


def shown_key(key: str) -> str:
    """Return a key for logs and messages: without the id of a caller and the id of a call.

    >>> shown_key("penstock:default:{web@1f2e}:replies"), shown_key("penstock:default:{f}:body:c0ffee")
    ('penstock:default:{web@...}:replies', 'penstock:default:{f}:body:...')
    """
    return _SECRET_KEY.sub(_without_secrets, key)


def _without_secrets(found: re.Match[str]) -> str:
    tag, kind = found["tag"], found["kind"]
    if kind == "replies" or _CALLER.fullmatch(tag):
        user, at, _ = tag.partition("@")
        tag = f"{user}@..." if at else "..."
    return f"{{{tag}}}:{kind}" + (":..." if kind == "body" else "")


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
        self.pattern = self._root + "*"
        """Matches every key of the instance and none of another (``SCAN MATCH``)."""

    def code(self, digest: str) -> str:
        return f"{self._root}{{registry}}:code:{digest}"

    def reports(self, kind: str) -> str:
        """A hash: what the parts of one ``kind``, such as ``replicas``, say of themselves."""
        return f"{self._root}{{registry}}:reports:{kind}"

    def of_backend(self, backend: str) -> str:
        """Matches every key of one backend (``SCAN MATCH``)."""
        return f"{self._root}{{{backend}}}:*"

    def requests(self, backend: str) -> str:
        return f"{self._root}{{{backend}}}:requests"

    def batch(self, backend: str) -> str:
        return f"{self._root}{{{backend}}}:requests:batch"

    def sizes(self, backend: str) -> str:
        """A hash: the bytes of the unsettled requests that are not small; see ``broker/queue/queued_bytes.py``."""
        return f"{self._root}{{{backend}}}:sizes"

    def dead(self, backend: str) -> str:
        return f"{self._root}{{{backend}}}:dead"

    def done(self, backend: str) -> str:
        """A hash: how many requests its replicas answered, and how long that took (``broker/queue/stats.py``)."""
        return f"{self._root}{{{backend}}}:done"

    def alive(self, backend: str, replica: str) -> str:
        """The lease of a replica; ``alive(backend, "")`` is what all of a backend's begin with."""
        return f"{self._root}{{{backend}}}:alive:{replica}"

    def proxy_alive(self, proxy: str) -> str:
        """The lease of a proxy."""
        return f"{self._root}{{registry}}:alive-proxy:{proxy}"

    def history(self, backend: str, entry: str) -> str:
        """A list: the deliveries of one entry that ended with their replica's death."""
        return f"{self._root}{{{backend}}}:history:{entry}"

    def streamed(self, backend: str, entry: str) -> str:
        """The mark of an entry whose answer has begun to stream: it must not be run again."""
        return f"{self._root}{{{backend}}}:streamed:{entry}"

    def body(self, backend: str, request: str) -> str:
        return f"{self._root}{{{backend}}}:body:{request}"

    def signals(self, backend: str) -> str:
        """A short stream to all of a backend's replicas; see ``broker/queue/signals.py``."""
        return f"{self._root}{{{backend}}}:signals"

    def job(self, caller: str) -> str:
        """What is known of a named batch job, by whose replies its results are."""
        return f"{self._root}{{{caller}}}:job"

    def job_input(self, caller: str) -> str:
        """The stream of hashes over the rows of a named batch job's input."""
        return f"{self._root}{{{caller}}}:job:input"

    def job_owner(self, caller: str) -> str:
        """The lease of the producer that works on a named batch job."""
        return f"{self._root}{{{caller}}}:owner"

    @staticmethod
    def job_name(job: str) -> str:
        """What the caller of a named batch job is called. No name of a backend holds a colon."""
        return f"job:{job}"

    @staticmethod
    def caller(user: str, name: str) -> str:
        """The id of a caller: it begins with its Redis user, so that an ACL can leave to each user its own replies.

        Quoted, a user's name ends at the first ``@`` and holds no brace, no colon and no wildcard.

        >>> Keys.caller("web", "1f2e"), Keys.caller("a@b*", "job:1"), Keys.caller("", "1f2e")
        ('web@1f2e', 'a%40b%2A@job:1', '1f2e')
        """
        return f"{quote(user, safe='')}@{name}" if user else name

    def replies(self, caller: str) -> str:
        return f"{self._root}{{{caller}}}:replies"

    def reply_body(self, caller: str, request: str) -> str:
        return f"{self._root}{{{caller}}}:body:{request}"
