"""A process that has imported what the command needs, and forks for each run of it.

The imports take a second of processor time, longer than most commands run. Ray is not among them: a fork cannot use it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_IMPORTS = (
    *("starlette.requests", "pydantic", "pyarrow.parquet"),
    *(f"penstock.serve.cli.{name}" for name in ("batch", "call", "dead", "deploy", "lifetime", "requests", "status")),
    "penstock.handles.files.rows",
)


class CommandServer:
    """Runs commands in forks of one process, which ends with `close`."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "commands")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._path], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def run(
        self, arguments: Sequence[str], environ: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """Run the command; return its exit code and what it wrote to stdout and stderr.

        Raises:
            TimeoutError: it did not end in time, and was killed.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(self._path)
            pipes = [os.pipe() for _ in range(3)]
            (stdin_end, to_stdin), (from_stdout, stdout_end), (from_stderr, stderr_end) = pipes
            request = json.dumps({"arguments": list(arguments), "environ": dict(environ), "cwd": os.getcwd()}).encode()
            try:
                socket.send_fds(connection, [len(request).to_bytes(4, "big")], [stdin_end, stdout_end, stderr_end])
            finally:
                for end in (stdin_end, stdout_end, stderr_end):
                    os.close(end)
            connection.sendall(request)
            read: dict[int, bytes] = {}
            threads = [
                threading.Thread(target=_write, args=(to_stdin, stdin)),
                *(threading.Thread(target=_read, args=(end, read)) for end in (from_stdout, from_stderr)),
            ]
            for thread in threads:
                thread.start()
            try:
                code = int.from_bytes(connection.recv(4), "big", signed=True)
            except TimeoutError:
                connection.shutdown(socket.SHUT_WR)  # upon which the command is killed
                raise TimeoutError(f"{' '.join(arguments)} did not end within {timeout_s:g} s") from None
            finally:
                for thread in threads:
                    thread.join()
            return code, read[from_stdout], read[from_stderr]

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()


def _write(end: int, data: bytes) -> None:
    try:
        with os.fdopen(end, "wb") as pipe:
            pipe.write(data)
    except BrokenPipeError:
        pass  # the command ended before it had read all


def _read(end: int, into: dict[int, bytes]) -> None:
    with os.fdopen(end, "rb") as pipe:
        into[end] = pipe.read()


def _serve(path: str) -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork that serves a connection
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve_one(connection)
            return
        connection.close()


def _serve_one(connection: socket.socket) -> None:
    """Run one command, in a fork of this one."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as requests:
        request = json.loads(requests.read(int.from_bytes(head, "big")))
    if (pid := os.fork()) == 0:
        connection.close()
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environ"])
        os.chdir(request["cwd"])
        sys.argv = ["penstock", *request["arguments"]]
        importlib.import_module("penstock.serve.cli").main()
        return
    for descriptor in descriptors:
        os.close(descriptor)
    threading.Thread(target=_kill_when_closed, args=(connection, pid), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def _kill_when_closed(connection: socket.socket, pid: int) -> None:
    if connection.recv(1) == b"":
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
