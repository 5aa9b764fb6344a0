"""Code to deploy that writes down what it runs, where kill -9 cannot take it away."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

from penstock import serve


class Journal:
    """The requests that were started, with their times, in a file for each process that is written at each start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.go = folder.with_name("go")
        """Once there is this file, what is held goes on."""

    def opened(self) -> int:
        """Return the file of this process. What was written to it is with the kernel, and outlives the process."""
        path = self.folder / str(os.getpid())
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def started_ms(self) -> list[tuple[str, float]]:
        """Return the request and the Unix time of every start."""
        lines = [line.split() for path in self.folder.iterdir() for line in path.read_text().splitlines()]
        return [(line[0], float(line[1])) for line in lines if len(line) == 2]

    def starts(self) -> Counter[str]:
        """Return how often each request was started."""
        return Counter(name for name, _ in self.started_ms())


class Noting:
    """Writes down what it starts. Takes ``service_s`` for each request, and answers with what it was sent."""

    def __init__(self, folder: Path, service_s: float) -> None:
        journal = Journal(folder)
        self._service_s, self._go = service_s, journal.go
        self._file = journal.opened()

    def note(self, request: serve.Request) -> str:
        name = str(request.data)
        os.write(self._file, f"{name} {time.time() * 1000:.3f}\n".encode())
        return name


class Counting(Noting):
    """Any number at a time."""

    async def __call__(self, request: serve.Request) -> str:
        name = self.note(request)
        await asyncio.sleep(self._service_s)
        return name


class Stamping(Counting):
    """Answers with what no other run answers."""

    async def __call__(self, request: serve.Request) -> str:
        return f"{await super().__call__(request)} {uuid4().hex}"


class Holding(Counting):
    """`Counting`, and one that holds its requests until they may go on."""

    async def later(self, request: serve.Request) -> str:
        name = self.note(request)
        while not self._go.exists():  # noqa: ASYNC110 - it is another process that makes the file
            await asyncio.sleep(0.01)
        return name


class HeldAtStart(Counting):
    """`Counting`, once it may go on."""

    def __init__(self, folder: Path, service_s: float) -> None:
        super().__init__(folder, service_s)
        while not self._go.exists():
            time.sleep(0.01)


class Blocking(Noting):
    """One at a time: its capacity is known."""

    def __call__(self, request: serve.Request) -> str:
        name = self.note(request)
        time.sleep(self._service_s)
        return name


class Held(Noting):
    """Takes batches, and holds each until it may go on."""

    @serve.accept_batch
    def __call__(self, requests: list[serve.Request]) -> list[str]:
        names = [self.note(request) for request in requests]
        while not self._go.exists():
            time.sleep(0.01)
        return names


class Poisonable(Counting):
    """Dies of what its code has no answer to; ``immune`` is the code that was mended."""

    def __init__(self, folder: Path, service_s: float, immune: bool = False) -> None:
        super().__init__(folder, service_s)
        self._immune = immune

    async def __call__(self, request: serve.Request) -> str:
        if str(request.data).startswith("poison") and not self._immune:
            self.note(request)
            os._exit(1)
        return await super().__call__(request)


def echo(request: serve.Request) -> object:
    return request.data
