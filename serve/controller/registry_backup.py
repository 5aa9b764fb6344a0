"""A backup of the registry, for a broker that loses its data."""

from __future__ import annotations

import logging

from ...broker.registry.records import Change, Snapshot
from ...broker.registry.store import Registry
from ..settings import Settings

log = logging.getLogger(__name__)


class RegistryBackup:
    """The registry's content when it was last read, including the code of the backends."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._snapshot = Snapshot()
        self._codes: dict[str, bytes] = {}

    async def keep(self, registry: Registry, settings: Settings, snapshot: Snapshot) -> None:
        """Replace the backup with ``settings`` and ``snapshot``; read only the code that it lacks."""
        needed = {settings.middlewares} - {""}
        needed.update(*(record.stored for record in snapshot.backends.values()))
        for digest in needed - self._codes.keys():
            self._codes[digest] = await registry.get_code(digest)
        for digest in self._codes.keys() - needed:
            del self._codes[digest]
        self._settings, self._snapshot = settings, snapshot

    async def restore(self, registry: Registry) -> Settings:
        """Write the backup to the registry and return its settings. Records that were written since are kept.

        There must be a backup: the controller keeps one before it can meet an empty registry.
        """
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
        log.warning("the broker had lost its data: restored %d backends", len(kept.backends))
        return self._settings
