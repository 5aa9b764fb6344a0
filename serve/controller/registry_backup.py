"""A backup of the registry, for a broker that loses its data."""

from __future__ import annotations

import logging

from ...broker.registry.records import Change, Snapshot
from ...broker.registry.store import Registry
from ..settings import Settings

log = logging.getLogger(__name__)


class RegistryBackup:
    """What was in the registry when it was last seen whole, the backends' code included."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._snapshot = Snapshot()
        self._codes: dict[str, bytes] = {}

    async def keep(self, registry: Registry, settings: Settings, snapshot: Snapshot) -> None:
        """Take over what has changed."""
        wanted = {settings.middlewares} - {""}
        wanted.update(*(record.stored for record in snapshot.backends.values()))
        for digest in wanted - self._codes.keys():
            self._codes[digest] = await registry.get_code(digest)
        for digest in self._codes.keys() - wanted:
            del self._codes[digest]
        self._settings, self._snapshot = settings, snapshot

    async def restore(self, registry: Registry) -> Settings:
        """Write it all again, beside what somebody may have written since, and return the settings."""
        assert self._settings is not None
        kept = self._snapshot
        for blob in self._codes.values():
            await registry.put_code(blob)
        await registry.change(
            lambda seen: Change(
                backends={tag: record for tag, record in kept.backends.items() if tag not in seen.backends},
                endpoints={name: record for name, record in kept.endpoints.items() if name not in seen.endpoints},
            )
        )
        await self._settings.write(registry)
        log.warning("the broker had lost its data: wrote %d backends again", len(kept.backends))
        return self._settings
