"""Error replies of Redis that pass by themselves, and error replies of a server that is not the primary.

A command that was answered with one of them has not been carried out, so sending it again repeats nothing.
"""

from __future__ import annotations

from redis import exceptions as redis_errors

from .commands import Script

TEMPORARY = frozenset({"BUSY", "CLUSTERDOWN", "LOADING", "MISCONF", "NOREPLICAS", "OOM", "TRYAGAIN"})
"""The first words of error replies of a server that will take the command later."""

NOT_PRIMARY = frozenset({"MASTERDOWN", "READONLY", "UNBLOCKED"})
"""The first words of error replies of a server that was demoted: the address may lead to another one by now."""

MEMORY = "OOM"

WRITE_PROBE = Script("""#!lua flags=allow-oom
return 1
""")
"""Is refused whenever the server refuses writes, and writes nothing. Needs no key and no right but that to run scripts.

`ROLE` would need a right that the users of docs/security.md do not have, and does not show the other reasons.
"""

_CODES: tuple[tuple[type[redis_errors.RedisError], str], ...] = (
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.ClusterDownError, "CLUSTERDOWN"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.OutOfMemoryError, MEMORY),
    (redis_errors.NoPermissionError, "NOPERM"),
)


def code_of(error: redis_errors.RedisError) -> str:
    """Return the first word of an error reply that redis-py raised; it cuts off those that it has classes for."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return str(error).partition(" ")[0]
