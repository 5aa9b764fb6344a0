"""``penstock status --watch``, also during an outage of the broker."""

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
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import environment, on_terminal


async def declare(url: str) -> None:
    """Write the keys of an instance that does not run."""
    connection = RedisConnection(url, name="test")
    await connection.open()
    await Settings(owner="nobody", node="none").write(Registry(connection, Keys(INSTANCE)))
    await connection.close()


def test_watching_continues_during_an_outage_and_shows_it(tmp_path: Path) -> None:
    with EmbeddedServer.start(data_dir=tmp_path) as server:
        asyncio.run(declare(server.url))
        command = command_line("status", "--watch", "--json", "--every", "0.1")
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


def test_a_terminal_shows_the_time_of_the_status(tmp_path: Path) -> None:
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
