"""The runner of user code: whatever the code does, each request gets one reply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ...broker.wire.requests import Entry
from ...handles.errors import BackendError, ConfigError
from .calls import CallGroup, LoopCall, RefusedCall, RunningCall, ThreadCall
from .context import context_of
from .errors import backend_error, failure
from .executor import Executor, OnReply
from .methods import CHECK_HEALTH, RECONFIGURE
from .stream_writer import StreamSink
from .threads import Threads
from .user_code import LoadedCode, Method, NotCallable, UserCode

T = TypeVar("T")

log = logging.getLogger(__name__)

_ASYNC_CONCURRENCY = 100
_HEALTH_CHECK_TIMEOUT_S = 30.0


class Runner:
    """The user's code in one replica.

    ``blob`` is what `target.dump` wrote; ``config`` is a backend's configuration, of which this uses ``allow_pickle``,
    ``health_check_timeout_s``, ``max_concurrent_queries`` and ``user_config``.

    Code that blocks runs on threads, one unless ``max_concurrent_queries`` says more; ``async def`` code runs on the
    loop. That is decided for each method. A constructor runs where ``__call__`` will.
    """

    def __init__(self, backend: str, replica: str, blob: bytes, config: Mapping[str, Any]) -> None:
        self.backend, self.replica = backend, replica
        self.config = dict(config)
        self._blob = blob

    def stream_to(self, stream_sink: StreamSink) -> None:
        """Send the parts of streamed replies to ``stream_sink``, for callers that accept parts."""
        self._executor.stream_sink = stream_sink

    def keep_time_by(self, now_ms: Callable[[], float]) -> None:
        """Start nothing whose deadline has passed by ``now_ms``, Unix time by the clock that deadlines are in.

        What is not started is answered as what was cancelled is: its caller no longer waits. Any thread may ask for the
        time.
        """
        self._executor.now_ms = now_ms

    async def start(self) -> None:
        """Load and construct the user's code, and configure it if there is a ``user_config``.

        Raises:
            BackendError: what any of that raised, with its traceback.
            ConfigError: there is a ``max_batch_size``, and nothing of it takes batches; or a ``user_config``, and it
                has no ``reconfigure``.
        """
        context = context_of(self.backend, self.replica)
        self._threads = Threads(self.replica, self._thread_limit(), context)
        self._executor = Executor(self.backend, self.replica, self._threads, context)
        self._executor.allow_pickle = self._allow_pickle()
        code: LoadedCode = await self._threads.call(_guarded, LoadedCode.load, self._blob)
        self._target: UserCode
        if code.is_async:
            self._target = context.run(_guarded, code.construct)
        else:
            self._target = await self._threads.call(_guarded, code.construct)
        self._blob = b""  # it can be a whole model
        self._check_batch_size(self.config)
        if (user_config := self.config.get("user_config")) is not None:
            await self._configure(user_config)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Use ``config`` from now on, calling the user's ``reconfigure`` only if ``user_config`` is another one.

        Raises:
            BackendError: what that raised; the configuration is the old one still.
            ConfigError: as for `start`.
        """
        self._check_batch_size(config)
        if (user_config := config.get("user_config")) != self.config.get("user_config"):
            await self._configure(user_config)
        self.config = dict(config)
        self._executor.allow_pickle = self._allow_pickle()
        self._threads.limit = self._thread_limit()

    async def check_health(self) -> None:
        """Call the user's ``check_health``, if there is one.

        On a thread it waits its turn behind what runs there: its own time alone counts.

        Raises:
            BackendError: it raised, or took longer than ``health_check_timeout_s``.
        """
        if (hook := self._target.hook(CHECK_HEALTH)) is None:
            return
        loop, started = asyncio.get_running_loop(), asyncio.Event()

        def check() -> None:
            loop.call_soon_threadsafe(started.set)
            hook.function()

        if hook.is_async:
            started.set()
            call = self._executor.spawn(_guarded_async(hook.function))
        else:
            call = self._executor.spawn(self._threads.call(_guarded, check))
        await started.wait()
        timeout_s = self.config.get("health_check_timeout_s") or _HEALTH_CHECK_TIMEOUT_S
        await asyncio.wait([call], timeout=timeout_s)
        if not call.done():
            call.cancel()
            message = f"check_health of {self.backend!r} took longer than {timeout_s:g} s"
            raise BackendError("TimeoutError", message)
        _result(call)

    @property
    def blocking(self) -> bool:
        """Whether ``__call__`` is other than ``async def``."""
        return not self._target.call.is_async

    @property
    def accepts_batch(self) -> bool:
        """Whether any method takes batches."""
        return self._target.accepts_batch

    def concurrency(self) -> int:
        """Return how many calls, each of one request or of a batch, may run at once."""
        return self.config.get("max_concurrent_queries") or (1 if self.blocking else _ASYNC_CONCURRENCY)

    def run(self, entries: Sequence[Entry], done: OnReply) -> RunningCall:
        """Start ``entries``: in one call if they are for a method that takes batches, else in one call each.

        Never raises: what goes wrong is the answer of the requests that it concerns.
        """
        first = entries[0].header.call
        if len(entries) == 1 or all(entry.header.call == first for entry in entries):
            return self._run(first, entries, done)
        calls: dict[str, list[Entry]] = {}
        for entry in entries:
            calls.setdefault(entry.header.call, []).append(entry)
        return CallGroup([self._run(call, together, done) for call, together in calls.items()])

    async def stop(self, timeout_s: float = 0.0) -> bool:
        """Wait for what runs, the background tasks of responses included, then end the threads.

        Returns False if some of it was still running after ``timeout_s`` seconds. That is abandoned, and nobody hears
        of it again, so that another replica can take those requests over.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        threads_ended = await self._threads.stop(timeout_s)
        # What was on a thread may have gone on in a task, but not the other way round.
        return await self._executor.close(max(0.0, ends_at - loop.time())) and threads_ended

    def _run(self, call: str, entries: Sequence[Entry], done: OnReply) -> RunningCall:
        try:
            method = self._target.method(call)
        except NotCallable as e:
            return RefusedCall(self._executor, entries, BackendError("AttributeError", str(e), status=e.status), done)
        except BaseException as e:  # a descriptor is the user's code, and may raise anything
            return self._fail(entries, e, done)
        if len(entries) > 1 and not method.accepts_batch:
            return CallGroup([self._start(method, [entry], done) for entry in entries])
        return self._start(method, entries, done)

    def _start(self, method: Method, entries: Sequence[Entry], done: OnReply) -> RunningCall:
        try:
            return (LoopCall if method.is_async else ThreadCall)(self._executor, method, entries, done)
        except Exception as e:  # such as a thread that the system does not start
            log.exception("cannot start a call of backend %r", self.backend)
            return self._fail(entries, e, done)

    def _fail(self, entries: Sequence[Entry], error: BaseException, done: OnReply) -> RunningCall:
        return RefusedCall(self._executor, entries, failure(error), done)

    def _allow_pickle(self) -> bool:
        return bool(self.config.get("allow_pickle", False))

    def _thread_limit(self) -> int:
        return self.config.get("max_concurrent_queries") or 1

    def _check_batch_size(self, config: Mapping[str, Any]) -> None:
        # Where the code was at hand, whoever called has been told before anything started.
        if (size := config.get("max_batch_size")) is not None and not self.accepts_batch:
            raise ConfigError(
                f"max_batch_size is {size}, but {self._target} takes one request: mark it with @serve.accept_batch"
            )

    async def _configure(self, user_config: Any) -> None:
        if (hook := self._target.hook(RECONFIGURE)) is None:
            raise ConfigError(f"user_config is given, but {self._target} has no method reconfigure to take it")
        if hook.is_async:
            call = self._executor.spawn(_guarded_async(hook.function, user_config))
            await asyncio.wait([call])
            _result(call)
        else:
            await self._threads.call(_guarded, hook.function, user_config)


# The exceptions of the user's code are turned where they are raised: some, such as SystemExit and StopIteration, would
# do harm on their way through a future or a task.


def _guarded(function: Callable[..., T], *args: Any) -> T:
    try:
        return function(*args)
    except BaseException as e:
        raise backend_error(e) from None


async def _guarded_async(function: Callable[..., Any], *args: Any) -> None:
    try:
        await function(*args)
    except asyncio.CancelledError:
        raise
    except BaseException as e:
        raise backend_error(e) from None


def _result(call: asyncio.Task[None]) -> None:
    if call.cancelled():
        raise BackendError("CancelledError", "the call was cancelled")
    call.result()
