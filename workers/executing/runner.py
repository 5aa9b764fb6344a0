"""The runner of user code: passes claims to it, and returns exactly one reply for each, whatever the code does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...broker.registry.records import BackendSpec
from ...handles.errors import BackendError, ConfigError
from ..asgi.application import AsgiApplication
from ..asgi.code import AsgiCode
from ..claim import Claim, RunningCall
from ..retry import RetryPolicy, check_names
from .calls import CallGroup, LoopCall, RefusedCall, ThreadCall
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


class Runner:
    """The user code of one replica, loaded and constructed by `start`.

    Code that blocks runs on threads; ``async def`` code runs on the loop. That is decided for each method. A
    constructor runs where ``__call__`` will.
    """

    def __init__(self, code: UserCode | AsgiCode, executor: Executor, config: BackendSpec) -> None:
        self.config = config
        """The backend's present configuration."""
        self._code, self._executor, self._threads = code, executor, executor.threads
        self._backend = executor.backend
        self._loop_call = code.start if isinstance(code, AsgiCode) else LoopCall
        """Starts a call on the loop."""

    @classmethod
    async def start(cls, backend: str, replica: str, blob: bytes | LoadedCode, config: BackendSpec) -> Runner:
        """Load and construct user code, and configure it if there is a ``user_config``.

        Args:
            backend: the backend's tag.
            replica: the replica's tag.
            blob: what `user_code.dump` returned; or the code itself, which then is not imported.
            config: the backend's configuration, of which the runner uses ``allow_pickle``, ``health_check_timeout_s``,
                ``max_batch_size``, ``max_concurrent_queries`` (for blocking code, the number of threads: 1 by default),
                ``retry`` and ``user_config``.

        Raises:
            BackendError: user code raised, or the lifespan of an ASGI application failed to start; the error has the
                traceback.
            ConfigError: there is a ``max_batch_size``, and no method takes batches; or there is a ``user_config``, and
                no ``reconfigure``; or ``retry`` names an error that does not exist.
        """
        context = context_of(backend, replica)
        threads = Threads(replica, _thread_limit(config), context)
        try:
            loaded: LoadedCode
            if isinstance(blob, LoadedCode):
                loaded = blob
            else:
                loaded = await threads.call(_guarded, LoadedCode.load, blob)
            code: UserCode | AsgiCode
            if isinstance(loaded.target, AsgiApplication):
                code = AsgiCode(loaded.target.target, backend)
                await code.startup(context)
            elif loaded.is_async:
                code = context.run(_guarded, loaded.construct)
            else:
                code = await threads.call(_guarded, loaded.construct)
            executor = Executor(backend, replica, threads, context)
            executor.allow_pickle = config.allow_pickle
            runner = cls(code, executor, config)
            runner._check_batch_size(config)
            await runner._check_retries(config)
            executor.retries = RetryPolicy(config.retry)
            if (user_config := config.user_config) is not None:
                await runner._configure(user_config)
        except BaseException:
            await threads.stop(0.0)
            raise
        return runner

    def attach(
        self,
        stream_sink: StreamSink | None,
        now_ms: Callable[[], float],
        report_progress: Callable[[Claim, bytes], None] | None = None,
        reply_early: OnReply | None = None,
    ) -> None:
        """Connect the runner to a replica.

        Args:
            stream_sink: sends the parts of streamed replies; without it, no reply is streamed.
            now_ms: Unix time in milliseconds by the broker's clock. From now on, a request whose deadline has passed is
                not started; its reply is `RequestCancelled`, for a caller that no longer waits. Any thread may call it.
            report_progress: records the progress of a kept request, as JSON; called on the loop.
            reply_early: sends the reply to a request whose code goes on; called on the loop.
        """
        self._executor.stream_sink, self._executor.now_ms = stream_sink, now_ms
        if report_progress is not None:
            self._executor.report_progress = report_progress
        if reply_early is not None:
            self._executor.reply_early = reply_early

    async def reconfigure(self, config: BackendSpec) -> None:
        """Use ``config`` from now on. Calls the user's ``reconfigure`` only if ``user_config`` has changed.

        Raises:
            BackendError: ``reconfigure`` raised; the old configuration stays.
            ConfigError: as for `start`.
        """
        self._check_batch_size(config)
        if config.retry != self.config.retry:
            await self._check_retries(config)
        if (user_config := config.user_config) != self.config.user_config:
            await self._configure(user_config)
        self._executor.retries = RetryPolicy(config.retry)
        self.config = config
        self._executor.allow_pickle = config.allow_pickle
        self._threads.limit = _thread_limit(config)

    async def check_health(self) -> None:
        """Call the user's ``check_health``, if there is one.

        On a thread it waits behind the running calls. That time does not count.

        Raises:
            BackendError: it raised, or took longer than ``health_check_timeout_s``.
        """
        if (hook := self._code.hook(CHECK_HEALTH)) is None:
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
        timeout_s = self.config.health_check_timeout_s
        await asyncio.wait([call], timeout=timeout_s)
        if not call.done():
            call.cancel()
            message = f"check_health of {self._backend!r} took longer than {timeout_s:g} s"
            raise BackendError("TimeoutError", message)
        _result(call)

    @property
    def is_blocking(self) -> bool:
        """Whether ``__call__`` is blocking code, and not ``async def``."""
        return not self._code.call.is_async

    @property
    def accepts_batch(self) -> bool:
        """Whether any method takes batches."""
        return self._code.accepts_batch

    def concurrency(self) -> int:
        """Return how many calls, each of one request or of a batch, may run at once."""
        return self.config.max_concurrent_queries or (1 if self.is_blocking else _ASYNC_CONCURRENCY)

    def run(self, claims: Sequence[Claim], done: OnReply) -> RunningCall:
        """Start claims: in one call if they are for a method that takes batches, else in one call each.

        Never raises: an error is the reply to the requests that it concerns. ``done`` is called once for each claim.
        """
        first = claims[0].entry.header.call
        if len(claims) == 1 or all(claim.entry.header.call == first for claim in claims):
            return self._run(first, claims, done)
        calls: dict[str, list[Claim]] = {}
        for claim in claims:
            calls.setdefault(claim.entry.header.call, []).append(claim)
        return CallGroup([self._run(call, together, done) for call, together in calls.items()])

    async def stop(self, timeout_s: float = 0.0) -> bool:
        """Wait for all running calls and the background tasks of responses, then end the threads and the lifespan.

        Returns False if some were still running after ``timeout_s`` seconds. These get no reply, so that another
        replica can redeliver their requests.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        threads_ended = await self._threads.stop(timeout_s)
        # A call on a thread may continue in a task, but a task cannot continue on a thread: the threads end first.
        finished = await self._executor.close(max(0.0, ends_at - loop.time())) and threads_ended
        if isinstance(self._code, AsgiCode):
            await self._code.shutdown(ends_at - loop.time())
        return finished

    def _run(self, call: str, claims: Sequence[Claim], done: OnReply) -> RunningCall:
        try:
            method = self._code.method(call)
        except NotCallable as e:
            return RefusedCall(self._executor, claims, BackendError("AttributeError", str(e), status=e.status), done)
        except BaseException as e:  # a descriptor is user code, and may raise anything
            self._executor.error_log.record([claim.entry for claim in claims], failure(e))
            return self._fail(claims, e, done)
        if len(claims) > 1 and not method.accepts_batch:
            return CallGroup([self._start(method, [claim], done) for claim in claims])
        return self._start(method, claims, done)

    def _start(self, method: Method, claims: Sequence[Claim], done: OnReply) -> RunningCall:
        try:
            return (self._loop_call if method.is_async else ThreadCall)(self._executor, method, claims, done)
        except Exception as e:  # such as a thread that the system does not start
            log.exception("cannot start a call of backend %r", self._backend)
            return self._fail(claims, e, done)

    def _fail(self, claims: Sequence[Claim], error: BaseException, done: OnReply) -> RunningCall:
        return RefusedCall(self._executor, claims, failure(error), done)

    def _check_batch_size(self, config: BackendSpec) -> None:
        # `create_backend` makes the same check where it can load the code.
        if (size := config.max_batch_size) is not None and not self.accepts_batch:
            raise ConfigError(
                f"max_batch_size is {size}, but {self._code} takes one request: mark it with @serve.accept_batch"
            )

    async def _check_retries(self, config: BackendSpec) -> None:
        if (retry := config.retry) is not None:
            # On a thread, as it may import modules; not on one of the code, which may be busy.
            await asyncio.to_thread(check_names, retry.on, may_be_elsewhere=False)

    async def _configure(self, user_config: Any) -> None:
        if (hook := self._code.hook(RECONFIGURE)) is None:
            raise ConfigError(f"user_config is given, but {self._code} has no method reconfigure to take it")
        if hook.is_async:
            call = self._executor.spawn(_guarded_async(hook.function, user_config))
            await asyncio.wait([call])
            _result(call)
        else:
            await self._threads.call(_guarded, hook.function, user_config)


def _thread_limit(config: BackendSpec) -> int:
    return config.max_concurrent_queries or 1


# The exceptions of user code are converted where they are raised: some, such as SystemExit and StopIteration, must not
# pass through a future or a task.


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
