"""Pickle policy: a reply is unpickled only if the record of the called backend allows it.

Unpickling runs code, and every process that may write to the reply stream can write a pickle.
"""

from __future__ import annotations

from ...broker.registry.records import BackendRecord
from ...broker.registry.watcher import Watcher
from ..errors import BrokerRefused, BrokerUnavailable, WireError
from .call import Call


class PicklePolicy:
    """Decides whether replies may be unpickled, by the records that ``watcher`` follows."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def allows(self, call: Call) -> bool:
        """Return whether the backend's record allows pickle, now or when the call was made."""
        return _allows(call.record) or _allows(self._watcher.snapshot.backends.get(call.backend))

    async def check(self, call: Call) -> None:
        """Return if pickle is allowed, also by a record that is newer than the last snapshot.

        Raises:
            WireError: the backend's record does not allow pickle.
        """
        if self.allows(call):
            return
        try:
            await self._watcher.refresh()  # a replica may have seen a newer record than this process
        except (BrokerUnavailable, BrokerRefused):
            pass
        if not self.allows(call):
            raise WireError(
                f"the reply of backend {call.backend!r} to request {call.shown_id!r} is pickled, and was not read: "
                "the backend was not created with config={'allow_pickle': True}"
            )


def _allows(record: BackendRecord | None) -> bool:
    return record is not None and record.config.allow_pickle
