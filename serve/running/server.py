"""The process of ``penstock run``: runs the first version of a program, waits, and reloads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any

from ...broker.defaults import INSTANCE
from ...broker.errors import ConfigError
from ...broker.transport.url import REDIS_URL
from .. import client as clients
from ..cli.deployment import deploy_text
from ..cli.exits import FAILED, INTERRUPTED
from ..client import Client
from ..lifecycle import start, started_clients
from .file_watch import FileWatch
from .program import is_script, run_script, show_error

_AGAIN = "from penstock.serve.running.again import main; main()"
_END_S = 10.0
"""How long a reload that is interrupted may take to end."""


def run_program(
    program: str, arguments: Sequence[str], redis_url: str | None, instance: str, http: dict[str, Any], *, reload: bool
) -> int:
    """Run a program, serve its backends until an interruption or the end of the instance, and return the exit code.

    Raises:
        ConfigError: an argument is not allowed.
        PenstockError: the instance cannot be started.
    """
    # A script reads these where it calls `serve.start` without them.
    os.environ[INSTANCE] = instance
    if redis_url is not None:
        os.environ[REDIS_URL] = redis_url
    if is_script(program):
        return _Server(program, arguments, reload).run_script()
    with start(http_options=http) as client:
        return _Server(program, arguments, reload).serve(client)


class _Server:
    """One program that is served."""

    def __init__(self, program: str, arguments: Sequence[str], reload: bool) -> None:
        self._program, self._arguments, self._reload = program, arguments, reload
        self._folder = Path(program).resolve().parent if program.endswith((".py", ".yaml", ".yml")) else Path.cwd()
        self._stop = Event()
        self._has_waited = False

    def run_script(self) -> int:
        """Run a script in this process, which then owns the instance that the script starts."""
        with self._waiting_hook():
            try:
                run_script(self._program, self._arguments)
            except KeyboardInterrupt:
                return INTERRUPTED
            except Exception as e:
                show_error(e, self._program)
                return FAILED
            finally:
                running = started_clients()
                if sys.exc_info()[0] is not None:
                    self._close(running)
            if self._has_waited:  # and was interrupted
                self._close(running)
                return 0
            if not running:
                raise ConfigError(
                    f"{self._program} has started no instance: call serve.start() in it and leave it open, or serve a "
                    f"function of it: penstock run {Path(self._program).stem}:NAME"
                )
            try:
                running[0].wait()
            finally:
                self._close(running)
            return 0

    def serve(self, client: Client) -> int:
        """Load a module or a manifest, and serve it."""
        while not self._load(client):
            if not self._reload:
                return FAILED
            _show(f"waiting for a change of {self._program}")
            if not FileWatch([self._folder]).wait(self._stop):
                return FAILED
        with self._waiting_hook():
            client.wait()
        return 0

    @contextmanager
    def _waiting_hook(self) -> Generator[None]:
        """Show the routes, and begin to reload, when a client begins to wait."""
        watching: list[Thread] = []

        def on_wait(client: Client) -> None:
            self._has_waited = True
            if threading.current_thread() is threading.main_thread():  # Only that one may set handlers.
                signal.signal(signal.SIGTERM, _interrupt)
            _show_routes(client)
            if self._reload and not watching:
                watching.append(Thread(target=self._reload_forever, args=(client,), name="reload", daemon=True))
                watching[0].start()

        clients.before_waiting.append(on_wait)
        try:
            yield
        finally:
            clients.before_waiting.remove(on_wait)
            self._stop.set()
            for thread in watching:
                thread.join(_END_S)

    def _close(self, running: list[Client]) -> None:
        self._stop.set()
        for client in running:
            client.close()

    def _reload_forever(self, client: Client) -> None:
        watch = FileWatch([self._folder])
        while changed := watch.wait(self._stop):
            names = ", ".join(os.path.relpath(path, self._folder) for path in changed[:3])
            _show(f"reloading: {names}{' and others' if len(changed) > 3 else ''} changed")
            began_s = time.monotonic()
            if self._load(client):
                _show(f"reloaded in {time.monotonic() - began_s:.1f} s")
                _show_routes(client)
            elif not self._stop.is_set():
                _show(f"{self._program} was not reloaded: the version before goes on serving")

    def _load(self, client: Client) -> bool:
        """Load the present version beside the one that serves; return whether it serves now."""
        if self._program.endswith((".yaml", ".yml")):
            try:
                text = Path(self._program).read_text(encoding="utf-8")
                return deploy_text(text, self._program, client, check=False, prune=True, restart=(), json=False) == 0
            except Exception as e:
                show_error(e, self._program)
                return False
        environ = {**os.environ, REDIS_URL: client.redis_url, INSTANCE: client.instance}
        command = [sys.executable, "-c", _AGAIN, self._program, *self._arguments]
        with subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL) as loading:
            try:
                while not self._stop.is_set():
                    with suppress(subprocess.TimeoutExpired):
                        return loading.wait(timeout=0.1) == 0
            finally:
                loading.terminate()
        return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C, once: after that, the instance ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _show_routes(client: Client) -> None:
    lines = [f"serving on {client.http_url} (Ctrl-C ends it)" if client.http_url else "serving without HTTP"]
    for name, endpoint in sorted(client.list_endpoints().items()):
        to = ", ".join(endpoint["traffic"])
        where = f"{','.join(endpoint['methods'])} {endpoint['route']}" if endpoint["route"] else f"handle {name!r}"
        lines.append(f"  {where} -> {to}")
    _show("\n".join(lines))


def _show(text: str) -> None:
    print(text, flush=True)
