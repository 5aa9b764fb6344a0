"""A client in a forked child process."""

from __future__ import annotations

import subprocess
import sys

from penstock.broker.embedded.server import EmbeddedServer

SCRIPT = """
import os, sys
from penstock import serve
from penstock.broker.transport.connection import RedisConnection
from penstock.handles import background_loop
from penstock.serve.client import Client
from penstock.serve.instance import Instance
from penstock.serve.settings import Settings

async def open_():
    instance = await Instance(sys.argv[1], "default").open()
    await Settings(owner="nobody", node="none").write(instance.registry)
    return instance

client = Client(background_loop.run(open_()), None, owns=True, keep=False)
assert client.list_backends() == {}
child = os.fork()
if child == 0:
    try:
        client.list_backends()
    except serve.errors.PenstockError as e:
        print(e, flush=True)
    assert client.list_endpoints() == {}  # on a new connection, as handles use
    sys.exit(0)  # and the exit hooks run
assert os.waitpid(child, 0)[1] == 0
assert client.list_backends() == {}
assert background_loop.run(client._core.registry.get_settings()) is not None, "the child has ended the instance"
"""


def test_a_child_neither_uses_its_parents_connection_nor_ends_its_instance() -> None:
    with EmbeddedServer.start() as server:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, server.url],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    assert "belongs to process" in ran.stdout
    assert "serve.connect() makes one for this process" in ran.stdout
