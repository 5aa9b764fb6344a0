"""Batch producer: sends any number of items through an endpoint, and keeps in memory only those that are in flight.

Items go to the batch stream of a backend, so that interactive requests are claimed first.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Container, Iterable, Mapping, Sized
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ...broker.defaults import default_instance
from ...broker.registry.reports import JobReport
from ...broker.wire.keys import check_name
from ...runtime.notebooks import NotebookTable
from ..calls.request_client import RequestClient
from ..calls.shared_client import SharedClient
from ..calls.tracing import trace_headers
from ..errors import ConfigError
from ..files.rows import Rows
from ..options import CallOptions
from .batch import Batch
from .job_client import JobClient
from .job_progress import JobSource, open_job
from .job_reporter import JobReporter
from .pipeline import BatchPipeline, default_window, find_endpoint

JOB_TTL_S = 24 * 3600.0
"""Default of ``job_ttl_s``."""


class BatchProducer(NotebookTable):
    """Sends batches of items to one endpoint. Needs a Redis URL and no Ray; ``client.batch(endpoint)`` makes one too.

    ::

        producer = handles.connect("redis://broker:6379").batch("score")
        for result in producer.as_completed(rows):      # or `async for`
            print(result.index, result.value if result.error is None else result.error)

    A ``job`` outlives its producer: its results are kept until they expire. A producer that was killed can be started
    again with the same job and the same items in the same order. It sends only the items that were not accepted before,
    and gives the results of all items, each once. The job belongs to that input: other items, a different number of
    them, or another method are refused with a `ConfigError`.
    """

    def __init__(
        self,
        redis_url: str,
        endpoint: str,
        *,
        instance: str | None = None,
        window: int | None = None,
        timeout_s: float | None = None,
        method_name: str = "__call__",
        shard_key: str | None = None,
        job: str | None = None,
        job_ttl_s: float = JOB_TTL_S,
        restart_job: bool = False,
        retry_errors: bool = False,
    ) -> None:
        """Create a producer. Nothing is sent before a batch is iterated over.

        Args:
            redis_url: the Redis URL: ``redis://``, ``rediss://``, ``unix://`` or ``redis+sentinel://``.
            endpoint: name of the endpoint.
            instance: name of the instance, as given to ``serve.start``; see `handles.connect` for the default.
            window: the most items in flight. By default four times as many as the replicas can run at once, at least
                1,000 and at most half of ``max_queued_requests``.
            timeout_s: seconds until an item expires, counted from when it is first sent; None for never.
            method_name: the method of the backend's class.
            shard_key: items with the same key go to the same backend; None selects by the weights alone.
            job: name of a job that outlives this producer; None for a batch that ends with it.
            job_ttl_s: seconds for which the results of a job are kept after its producer is gone. Results of more than
                256 KiB are kept for two minutes, and computed again after that.
            restart_job: delete the results of earlier producers of the job, and begin anew.
            retry_errors: run the items again that failed when the job ran before.

        An item can have options of its own: see `BatchItem`.

        Raises:
            TypeError: an argument has the wrong type.
            ConfigError: an argument has a value that is not allowed.
        """
        self._url = redis_url
        self._instance = check_name("an instance", default_instance() if instance is None else instance)
        self._endpoint = check_name("an endpoint", endpoint)
        self._options = CallOptions(
            method_name=method_name, shard_key=shard_key, timeout_s=timeout_s, http_headers=trace_headers()
        )
        self._window = None if window is None else _count("window", window)
        self._job = None if job is None else check_name("a job", job)
        if isinstance(job_ttl_s, bool) or not isinstance(job_ttl_s, int | float):
            raise TypeError(f"job_ttl_s must be a number of seconds, not {type(job_ttl_s).__name__}")
        if not 1 <= job_ttl_s <= 1e9:
            raise ConfigError(f"job_ttl_s must be 1 to 1e9 seconds, not {job_ttl_s}")
        self._job_ttl_s = float(job_ttl_s)
        for name, value in (("restart_job", restart_job), ("retry_errors", retry_errors)):
            if type(value) is not bool:
                raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
            if value and job is None:
                raise ConfigError(f"{name}=True needs a job: pass job='its name'")
        self._source = JobSource(restart_job=restart_job, retry_errors=retry_errors)

    def describe_source(
        self, name: str, names: list[str] | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        """Describe the file or directory that the items come from. The job then refuses another one.

        Args:
            name: name of the file or directory.
            names: names of the files, if the items are the files of a directory. When the batch begins, the list is
                sorted in place: files of an earlier run in their order then, followed by new ones. The items must be
                this list.
            on_restart: called before ``restart_job`` deletes the job, to delete its data elsewhere.
        """
        self._source = replace(self._source, name=name, names=names, on_restart=on_restart)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._shown_options().items())
        return f"BatchProducer({self._endpoint!r}, instance={self._instance!r}{options})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"endpoint": self._endpoint, "instance": self._instance, **self._shown_options()}

    def _shown_options(self) -> dict[str, str]:
        shown = self._options.shown()
        for name, value in (("window", self._window), ("job", self._job)):
            if value is not None:
                shown[name] = repr(value)
        return shown

    def as_completed(self, items: Iterable[Any] | AsyncIterable[Any], *, skip: Container[int] = ()) -> Batch:
        """Return the results of ``items`` in the order in which they finish.

        Args:
            items: values as handles send them, or `BatchItem` objects. The input is read as there is room in the
                window: by ``for`` in the iterating thread, by ``async for`` on the event loop, which it must not block.
                An exception among the items is not sent: it becomes the ``error`` of its own result.
            skip: indices of items that are not sent and give no result, because they were done before.

        Raises:
            TypeError: ``items`` cannot be iterated over, or ``skip`` is not a container.
        """
        return self._batch(items, skip, in_order=False)

    def map(self, items: Iterable[Any] | AsyncIterable[Any], *, skip: Container[int] = ()) -> Batch:
        """Return the results of ``items`` in the order of the items; see `as_completed`.

        A slow item delays the results behind it, which are kept in memory meanwhile.
        """
        return self._batch(items, skip, in_order=True)

    def _batch(self, items: Iterable[Any] | AsyncIterable[Any], skip: Container[int], *, in_order: bool) -> Batch:
        source = self._source
        if isinstance(items, Rows) and not source.name:
            source = replace(source, name=items.source, names=items.names)
        opened = partial(self._open_pipeline, source, items)
        return Batch(self._endpoint, items, opened, skip=skip, in_order=in_order)

    @asynccontextmanager
    async def _open_pipeline(
        self,
        source: JobSource,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        skip: Container[int],
        in_order: bool,
        on_results: Callable[[], None],
        on_want: Callable[[int], None],
    ) -> AsyncGenerator[BatchPipeline]:
        """Open the pipeline of a batch in the running loop; see `BatchPipeline` for the arguments."""
        async with self._connect() as client:
            endpoint = await find_endpoint(client, self._endpoint)
            window = self._window or await default_window(client, endpoint.traffic)
            job = None
            if isinstance(client, JobClient):
                job = await open_job(client, self._endpoint, self._options.method_name, source, skip)
            pipeline = BatchPipeline(
                client,
                self._endpoint,
                self._options,
                window,
                job=job,
                skip=skip,
                in_order=in_order,
                on_results=on_results,
                on_want=on_want,
            )
            reporter = None
            if isinstance(client, JobClient):
                total = len(items) if isinstance(items, Sized) else None
                report = JobReport(
                    job=client.job.name,
                    endpoint=self._endpoint,
                    source=source.name,
                    total=total,
                    ttl_s=self._job_ttl_s,
                )
                reporter = JobReporter(client, pipeline, report, partial(_share_of, items))
                reporter.start()
            try:
                yield pipeline
            finally:
                try:
                    if reporter is not None:
                        await reporter.stop()
                finally:
                    pipeline.stop()

    @asynccontextmanager
    async def _connect(self) -> AsyncGenerator[RequestClient]:
        if self._job is None:
            async with SharedClient.using(self._url, self._instance) as client:
                yield client
            return
        job_client = JobClient(self._url, self._instance, self._job, self._job_ttl_s)
        try:
            await job_client.open()
            yield job_client
        finally:
            await job_client.job.release()
            await job_client.close()


def _share_of(items: object) -> float | None:
    """Return how much of the items has been read, 0 to 1; None if that is not known."""
    if not isinstance(items, Rows) or not items.total:
        return None
    return min(1.0, items.read / items.total)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
    return value
