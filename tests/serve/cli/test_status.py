"""``penstock status --watch``, while what it looks at comes and goes."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from pathlib import Path

import orjson

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.serve.settings import Settings
from tests.handles.site import INSTANCE
from tests.serve.cli.conftest import COMMAND, environment, on_terminal


async def declare(url: str) -> None:
    """Leave in the broker what an instance leaves there when nothing of it runs."""
    connection = RedisConnection(url, name="test")
    await connection.open()
    await Settings(owner="nobody", node="none").write(Registry(connection, Keys(INSTANCE)))
    await connection.close()


def test_watching_goes_on_without_a_broker_and_says_so(tmp_path: Path) -> None:
    with EmbeddedServer.start(data_dir=tmp_path) as server:
        asyncio.run(declare(server.url))
        command = [*COMMAND, "status", "--watch", "--json", "--every", "0.1"]
        watching = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(server.url)
        )
        assert watching.stdout is not None
        assert orjson.loads(watching.stdout.readline())["backends"] == {}
    with watching:
        while "error" not in (seen := orjson.loads(watching.stdout.readline())):
            assert seen["backends"] == {}
        assert seen["error"]["type"] == "BrokerUnavailable"
        assert "error" in orjson.loads(watching.stdout.readline())
        watching.send_signal(signal.SIGINT)
        assert watching.stderr is not None
        assert watching.stderr.read().decode().splitlines()[-1] == "interrupted"
    assert watching.returncode == 130


def test_a_terminal_shows_when_it_was_looked_at(tmp_path: Path) -> None:
    with EmbeddedServer.start(data_dir=tmp_path) as server:
        asyncio.run(declare(server.url))
        arguments = ["status", "--watch", "--every", "0.1"]
        with on_terminal(arguments, environment(server.url), "stdout", "stderr") as (p, read):
            shown = b""
            while len(set(re.findall(rb"\d\d:\d\d:\d\d", shown))) < 2:
                more = read()
                assert more, shown
                shown += more
            p.send_signal(signal.SIGINT)
            while read():
                pass
    assert b"the controller is" in shown
    assert p.returncode == 130
