"""Classification of Redis's error replies: temporary refusals, and those of a server that is not the primary.

A command that got one of them was not carried out, so it is safe to send it again.
"""

from __future__ import annotations

from redis import exceptions as redis_errors

from .commands import Script

TEMPORARY = frozenset({"BUSY", "CLUSTERDOWN", "LOADING", "MISCONF", "NOREPLICAS", "OOM", "TRYAGAIN"})
"""First words of the error replies of a server that will accept the command later."""

NOT_PRIMARY = frozenset({"MASTERDOWN", "READONLY", "UNBLOCKED"})
"""First words of the error replies of a demoted server: the address may lead to the new primary by now."""

MEMORY = "OOM"

WRITE_PROBE = Script("""#!lua flags=allow-oom
return 1
""")
"""A script that writes nothing and is refused whenever writes are. It needs no key, and only the right to run scripts.

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
    """Return the first word of an error reply, which redis-py removes from the errors that it has classes for."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return str(error).partition(" ")[0]
