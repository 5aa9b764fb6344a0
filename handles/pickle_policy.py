"""Pickle policy: a reply is unpickled only if the record of the backend that was called allows it.

A pickle runs code where it is read, and any process that may write replies can write one.
"""

from __future__ import annotations

from ..broker.registry.records import BackendRecord
from ..broker.registry.watcher import Watcher
from .calls.call import Call
from .errors import BrokerRefused, BrokerUnavailable, WireError


class PicklePolicy:
    """Decides for the calls of one caller, by the registry that ``watcher`` follows."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def allows(self, call: Call) -> bool:
        """Return whether the record of the call's backend allows pickle now or did when the call was made."""
        return _allows(call.record) or _allows(self._watcher.snapshot.backends.get(call.backend))

    async def check(self, call: Call) -> None:
        """Return if `allows`, also by a record that is newer than the last snapshot.

        Raises:
            WireError: the backend's record does not allow pickle.
        """
        if self.allows(call):
            return
        try:
            await self._watcher.refresh()  # replicas may follow the registry more closely than this process
        except (BrokerUnavailable, BrokerRefused):
            pass
        if not self.allows(call):
            raise WireError(
                f"the reply of backend {call.backend!r} to request {call.shown_id!r} is pickled, and was not read: "
                "the backend was not created with config={'allow_pickle': True}"
            )


def _allows(record: BackendRecord | None) -> bool:
    return record is not None and record.config.get("allow_pickle") is True
