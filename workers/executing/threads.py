"""Threads for blocking code.

Each way costs the loop as little as can be: a job is put on a queue that its thread waits at, and what is finished
comes back in bursts, by one wake-up of the loop for all that became ready until it woke up. (``run_in_executor`` makes
two futures and a wake-up for each job: twice the processor time of a small request.)
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
    """Something to do on a thread, and what follows from it on the loop."""

    @abstractmethod
    def run(self) -> None:
        """Do it. Called on the thread; must not raise."""

    @abstractmethod
    def finish(self) -> None:
        """Called on the loop after `run`, in the order in which jobs became ready."""


class Threads:
    """Up to ``limit`` daemon threads, started when there is work for them, all in copies of ``context``.

    With a limit of one, all that runs here runs on the same thread and one after the other.
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
            RuntimeError: there is no thread, and the system starts none. The job is not run.
        """
        if len(self._threads) <= self._unfinished and len(self._threads) < self.limit:
            self._start_one()
        self._unfinished += 1
        self._jobs.put(job)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return what ``function(*args)`` returns on a thread, or raise what it raises.

        Cancelling the wait does not end the call.
        """
        outcome: asyncio.Future[T] = self._loop.create_future()
        call = _Call(function, args, outcome)
        self.submit(call)
        return await outcome

    async def stop(self, timeout_s: float) -> bool:
        """Wait for what was submitted, then end the threads.

        Returns False if some of it was unfinished after ``timeout_s`` seconds. What runs then ends with its thread or
        with the process, what waits is never run, and neither is heard of again.
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
            log.warning("the system starts no more threads: %d work where %d may", len(self._threads), self.limit)
            return
        self._threads.append(thread)

    def _work(self) -> None:
        take, ready = self._jobs.get, self._ready
        while (job := take()) is not None:
            try:
                job.run()
            except BaseException:  # a thread that ended would leave all jobs behind this one unrun
                log.exception("a job of %s failed", self._name)
            # Appended first, looked at second; `_finish_ready` does both the other way round. So either it sees this
            # job, or we see that it must be woken.
            ready.append(job)
            del job  # waiting for the next one, keep nothing of this one
            if not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._finish_ready)
                except RuntimeError:
                    return  # the loop is closed: nobody is left to tell

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
