"""Threads for blocking code.

A job is put on a queue that the threads read. Finished jobs come back together: the loop is woken once for all that
finish before it wakes up. (``run_in_executor`` makes two futures and wakes the loop for each job: twice the CPU time of
a small request.)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class ThreadJob(ABC):
    """A job that runs on a thread and then finishes on the loop."""

    @abstractmethod
    def run(self) -> None:
        """Run. Called on the thread; must not raise."""

    @abstractmethod
    def finish(self) -> None:
        """Finish. Called on the loop after `run`, in the order in which jobs became ready."""


class Threads:
    """Up to ``limit`` daemon threads, each started when a job needs it, in a copy of ``context``.

    With a limit of one, all jobs run on the same thread, one after the other.
    """

    def __init__(self, name: str, limit: int, context: Context) -> None:
        self.limit = limit
        self._name, self._context = name, context
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[ThreadJob | None] = SimpleQueue()
        self._ready: deque[ThreadJob] = deque()
        self._woken = False
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._idle: asyncio.Future[None] | None = None
        self._stopped = False

    def submit(self, job: ThreadJob) -> None:
        """Run ``job`` when a thread is free.

        Raises:
            RuntimeError: the system refused to start the first thread. The job does not run.
        """
        if len(self._threads) <= self._unfinished and len(self._threads) < self.limit:
            self._start_one()
        self._unfinished += 1
        self._jobs.put(job)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function(*args)`` on a thread, and return its result or raise its exception.

        Cancelling this coroutine does not end the call.
        """
        outcome: asyncio.Future[T] = self._loop.create_future()
        call = _Call(function, args, outcome)
        self.submit(call)
        return await outcome

    async def stop(self, timeout_s: float) -> bool:
        """Wait for the submitted jobs, then end the threads.

        Returns False if some were unfinished after ``timeout_s`` seconds. Those that wait then never run, and
        those that run are never finished; their threads end after them, or with the process.
        """
        if self._unfinished and timeout_s > 0:
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=timeout_s)
        self._stopped = True
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        if self._unfinished:
            return False
        for thread in self._threads:
            thread.join()  # it has nothing left to do
        return True

    def _start_one(self) -> None:
        name = f"{self._name}:{len(self._threads)}"
        thread = threading.Thread(target=self._context.copy().run, args=(self._work,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            log.warning(
                "the system refused to start another thread: %d of at most %d threads run",
                len(self._threads),
                self.limit,
            )
            return
        self._threads.append(thread)

    def _work(self) -> None:
        jobs, ready = self._jobs, self._ready
        while (job := jobs.get()) is not None:
            try:
                job.run()
            except BaseException:  # a thread that ended would leave all jobs behind this one unrun
                log.exception("a job of %s failed", self._name)
            # Append, then read `_woken`; `_finish_ready` does both in the other order. So either it finds this job, or
            # this thread finds that the loop must be woken.
            ready.append(job)
            del job  # keep no reference to it while waiting for the next one
            if not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._finish_ready)
                except RuntimeError:
                    return  # the loop is closed

    def _finish_ready(self) -> None:
        self._woken = False
        ready = self._ready
        while ready:
            job = ready.popleft()
            self._unfinished -= 1
            if self._stopped:
                continue
            try:
                job.finish()
            except Exception:
                log.exception("a job of %s cannot be finished", self._name)
        if not self._unfinished and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


class _Call(ThreadJob, Generic[T]):
    def __init__(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        outcome: asyncio.Future[T],
    ) -> None:
        self._function, self._args, self._outcome = function, args, outcome
        self._raised: BaseException | None = None

    def run(self) -> None:
        try:
            self._result: T = self._function(*self._args)
        except BaseException as e:
            self._raised = e

    def finish(self) -> None:
        if self._outcome.done():
            return
        if self._raised is None:
            self._outcome.set_result(self._result)
        else:
            self._outcome.set_exception(self._raised)
