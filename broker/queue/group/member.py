"""A member of a backend's consumer group: the names and the connection that all of its parts share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...transport.commands import Arg, Script
from ...transport.connection import RedisConnection
from ...wire._fields import RETRY_FIELD
from ...wire.entry_ref import ref_of
from ...wire.keys import Keys

log = logging.getLogger(__name__)

GROUP = "replicas"
"""The name of the group on each stream."""

RETURNED = "-returned-"
"""The consumer of entries that were given back. It never has a lease, so every replica may claim them."""


HISTORY_S = 7 * 24 * 3600
"""Expiry of the history of an entry, of its attempts, and of the mark of a reply that has begun to stream."""

# Lua: the attempts of an entry, and when the next one is due. ``add_retry`` adds them to the fields of an entry.
RETRY = f"""
local function retry_of(prefix, id)
  local retry = redis.call('GET', prefix .. id)
  return retry, tonumber(retry and string.match(retry, ':(%d+)$') or 0)
end
local function add_retry(fields, retry)
  if retry then
    fields[#fields + 1] = '{RETRY_FIELD.decode()}'
    fields[#fields + 1] = retry
  end
  return fields
end
"""


@dataclass(frozen=True)
class Member:
    """One replica as a member of the consumer group of its backend."""

    commands: RedisConnection
    keys: Keys
    backend: str
    replica: str

    @cached_property
    def streams(self) -> list[str]:
        """The request streams of the backend: the interactive one, and that of batch producers."""
        return [self.keys.requests(self.backend), self.keys.batch(self.backend)]

    @cached_property
    def retry_prefixes(self) -> list[str]:
        """The beginnings of the keys with the attempts of entries, by the stream of these."""
        prefix = self.keys.retry(self.backend, "")
        return [prefix, prefix + ref_of(b"", batch=True).decode()]

    @cached_property
    def lease_prefix(self) -> str:
        """The beginning of the keys of the leases of the backend's replicas."""
        return self.keys.alive(self.backend, "")

    def post_patient(self, script: Script, keys: list[str], args: list[Arg]) -> None:
        """Run a script in this tick's write; send it again until the broker accepts it."""
        self.commands.post_script(log_refusal, script, keys, args, repeat=True, patient=True)


def log_refusal(result: Any) -> None:
    """Log the error of a command that belongs to a settlement. It is patient, so the error is not a temporary one."""
    if isinstance(result, Exception):
        log.error("the broker refused a reply or its settlement: %s", result)
