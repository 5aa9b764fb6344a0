"""Job client: the request client of a batch job, whose requests and results outlive their producer."""

from __future__ import annotations

import logging
from functools import partial

from ...broker.queue.batch_jobs import BatchJob, BatchJobReplies
from ...broker.wire.keys import Keys
from ..calls.reply_receiver import FindReceiver, OnReply, no_receiver
from ..calls.request_client import RequestClient
from ..errors import NotPermitted

log = logging.getLogger(__name__)


class JobClient(RequestClient):
    """A request client that has the name of a job. The producers of a job therefore share a reply stream."""

    def __init__(self, url: str, instance: str, job: str, ttl_s: float) -> None:
        """Create a client that is not connected yet.

        Args:
            url: the Redis URL.
            instance: name of the instance.
            job: name of the job.
            ttl_s: seconds for which the results are kept after the producer is gone.
        """
        super().__init__(
            url,
            instance,
            name=Keys(instance).job_name(job),
            reply_stream=partial(BatchJobReplies, ttl_s=ttl_s),
            find_receiver=self._find_receiver_of,
            keep_calls=True,
        )
        assert isinstance(self._replies, BatchJobReplies)
        self.results = self._replies
        """The reply stream, which keeps the results of the job."""
        self.job = BatchJob(self._connection, self.keys, job, self.id, ttl_s)
        self._find_receiver: FindReceiver = no_receiver

    def read_results(self, find_receiver: FindReceiver) -> None:
        """Start to read the results of the job, from the first one on.

        ``find_receiver`` finds the receiver of the result of an item that an earlier producer has published.
        """
        self._find_receiver = find_receiver
        self.results.resume()

    async def published_items(self) -> dict[str, tuple[str, bytes]]:
        """Return the unsettled requests of the job: backend and entry, by the id of the request.

        A backend whose batch stream the Redis user may not read is left out, with a warning.
        """
        found: dict[str, tuple[str, bytes]] = {}
        for backend in self.snapshot.backends:
            try:
                entries = await self._publisher.find_of(backend, self.id)
            except NotPermitted:
                log.warning(
                    "cannot read which items of job %r are queued for backend %r: they are sent again",
                    self.job.name,
                    backend,
                )
                continue
            for id_, entry in entries.items():
                found[id_.decode()] = backend, entry
        return found

    def withdraw(self, backend: str, entry: bytes) -> None:
        """Withdraw an item of the job from a batch stream."""
        self._publisher.withdraw(backend, entry, batch=True)

    def _find_receiver_of(self, call_id: str) -> OnReply | None:
        return self._find_receiver(call_id)
