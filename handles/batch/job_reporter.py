"""Reports of a batch job to the registry, for the dashboard: how far it has come, and how it has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ...broker.errors import BrokerRefused, BrokerUnavailable
from ...broker.registry.reports import JOB_REPORT_S, JobReport, JobState
from .job_client import JobClient
from .pipeline import BatchPipeline

log = logging.getLogger(__name__)

_LAST_REPORT_S = 1.0
"""How long the last report may take."""


class JobReporter:
    """Reports one job while its pipeline runs, from `start` to `stop`.

    A report that cannot be written is only logged: the job goes on without it.

    Args:
        client: the client of the job.
        pipeline: the pipeline that works on the job.
        report: the first report.
        share: returns how much of the input has been read, 0 to 1; None if that is not known.
    """

    def __init__(
        self, client: JobClient, pipeline: BatchPipeline, report: JobReport, share: Callable[[], float | None]
    ) -> None:
        self._client, self._pipeline, self._share = client, pipeline, share
        self._report = replace(report, started_ms=client.connection.now_ms())
        self._reporting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report now, and regularly from now on."""
        self._reporting = asyncio.get_running_loop().create_task(self._keep_reporting(), name="job reports")

    async def stop(self) -> None:
        """Report how the job has ended, and stop."""
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.wait([self._reporting])
        if self._client.connected:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._send(has_ended=True), _LAST_REPORT_S)

    async def _keep_reporting(self) -> None:
        while True:
            if not await self._send():
                return
            await asyncio.sleep(JOB_REPORT_S)

    async def _send(self, *, has_ended: bool = False) -> bool:
        """Send a report; return False if further ones would be refused too."""
        client = self._client
        if client.job.lost:
            return False  # another producer reports
        try:
            await client.registry.put_report(client.id, await self._present(has_ended=has_ended))
        except BrokerUnavailable as e:
            log.debug("cannot report the job %r: %s", client.job.name, e)
        except BrokerRefused as e:
            log.warning("the dashboard does not show the job %r: %s", client.job.name, e)
            return False
        return True

    async def _present(self, *, has_ended: bool) -> JobReport:
        pipeline, report = self._pipeline, self._report
        progress = None if has_ended else await pipeline.progress()
        share = self._share()
        now = replace(
            report,
            done=pipeline.done,
            errors=pipeline.errors,
            total=report.total if pipeline.total is None else pipeline.total,
            share=None if share is None else round(share, 4),
            in_flight=pipeline.in_flight,
            retried=report.retried if progress is None else progress.retried,
            waits_for=None if progress is None else progress.waits_for,
            at_ms=self._client.connection.now_ms(),
        )
        if has_ended:
            state: JobState = (
                "failed" if pipeline.failure is not None else "finished" if pipeline.is_over else "stopped"
            )
            now = replace(now, state=state)
        self._report = now
        return now
