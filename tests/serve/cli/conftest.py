from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import orjson
import pytest

from tests.handles.site import Site
from tests.serve.cli.command_line import command_line


@dataclass(frozen=True)
class Ran:
    """The outcome of a command."""

    code: int
    out: str
    err: str

    def lines(self) -> list[Any]:
        """Return the JSON lines of its output."""
        return [orjson.loads(line) for line in self.out.splitlines()]


Penstock = Callable[..., Ran]


def environment(url: str) -> dict[str, str]:
    """Return the environment of a command; an empty ``url`` means no broker."""
    return {**os.environ, "PENSTOCK_REDIS_URL": url, "COLUMNS": "160"}


@contextmanager
def running(
    line: Sequence[str], environ: Mapping[str, str], stdin: IO[bytes] | None = None
) -> Generator[subprocess.Popen[str]]:
    """Run a command line; it is killed if the test leaves it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def on_terminal(
    arguments: Sequence[str], environ: Mapping[str, str], *streams: str
) -> Generator[tuple[subprocess.Popen[bytes], Callable[[], bytes]]]:
    """Run the command with ``streams`` on a terminal; yield the process and a function that reads the terminal."""
    terminal, end = pty.openpty()
    stdin, stdout, stderr = (end if name in streams else None for name in ("stdin", "stdout", "stderr"))
    environ = {**environ, "TERM": "xterm"}

    def read() -> bytes:
        with suppress(OSError):  # A closed terminal raises.
            return os.read(terminal, 10_000)
        return b""

    try:
        with subprocess.Popen(
            command_line(*arguments), stdin=stdin, stdout=stdout, stderr=stderr, env=environ
        ) as process:
            os.close(end)
            yield process, read
    finally:
        os.close(terminal)


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    site = Site(redis_url)
    yield site
    site.close()


def run(*arguments: object, url: str, stdin: str = "") -> Ran:
    """Run the command with the broker at ``url`` to its end."""
    ran = subprocess.run(
        command_line(*map(str, arguments)),
        input=stdin.encode(),
        capture_output=True,
        check=False,
        env=environment(url),
        timeout=100,
    )
    return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


@pytest.fixture
def penstock(redis_url: str) -> Penstock:
    """Runs the command with the broker of the test."""
    return partial(run, url=redis_url)
