"""Watch of source files: waits until one changes, appears or disappears, by their times and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from threading import Event

_POLL_S = 0.3
_SUFFIXES = (".py", ".yaml", ".yml")
_SKIPPED = ("__pycache__", "node_modules", "venv", "site-packages")

State = dict[str, tuple[int, int]]


class FileWatch:
    """Watches the Python and YAML files in some folders and below, without hidden folders and virtual environments."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = [str(folder) for folder in folders]
        self._seen = self._state()

    def wait(self, stop: Event) -> list[str]:
        """Return the paths that have changed since the last call, once there are some; none if ``stop`` is set.

        An editor may write a file in several steps, so it waits until nothing has changed for a moment.
        """
        while not stop.wait(_POLL_S):
            if (state := self._state()) == self._seen:
                continue
            while not stop.wait(_POLL_S) and (later := self._state()) != state:
                state = later
            changed = {path for path, _ in self._seen.items() ^ state.items()}
            self._seen = state
            return sorted(changed)
        return []

    def _state(self) -> State:
        state: State = {}
        for folder in self._folders:
            for root, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED]
                for name in files:
                    if name.endswith(_SUFFIXES):
                        path = os.path.join(root, name)
                        try:
                            found = os.stat(path)
                        except OSError:
                            continue  # it has just been deleted
                        state[path] = found.st_mtime_ns, found.st_size
        return state
