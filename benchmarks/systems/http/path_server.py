"""The path of a request without Ray: an embedded broker and a proxy here, a replica in a process of its own.

They are the classes that Penstock's actors are made of, and the registry is filled by hand.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import bare_path
import uvloop
from program import NOOP_ANSWER, Job, parse

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.proxy.proxy import Proxy
from penstock.workers.executing import user_code

INSTANCE, BACKEND = "default", "noop"


def noop(request: Any) -> Any:
    return NOOP_ANSWER


async def fill_registry(url: str) -> None:
    """Write down one backend and its endpoint, as ``create_backend`` and ``create_endpoint`` would."""
    connection = RedisConnection(url)
    await connection.open()
    registry = Registry(connection, Keys(INSTANCE))
    code = await registry.put_code(user_code.dump(noop))
    backend = BackendRecord(tag=BACKEND, version="1", code=code)
    endpoint = EndpointRecord(name=BACKEND, route="/", methods=("GET", "POST"), traffic={BACKEND: 1.0})
    await registry.change(lambda _: Change({BACKEND: backend}, {BACKEND: endpoint}))
    await connection.close()


def freeze() -> None:
    """As the actors do once they are ready."""
    gc.collect()
    gc.freeze()


async def serve(url: str, port: int) -> None:
    """Run the proxy until this process ends."""
    await fill_registry(url)
    replica = str(Path(__file__).with_name("path_replica.py"))
    await asyncio.create_subprocess_exec(sys.executable, replica, url, INSTANCE, BACKEND)  # its reaper ends it
    options: dict[str, Any] = {"port": port}
    if bare_path.is_asked_for():
        options["request_timeout_s"] = None
    await Proxy(url, INSTANCE, "proxy", options).ready()
    freeze()
    gc.set_threshold(20_000, 50, 50)
    await asyncio.Event().wait()


def main(job: Job) -> None:
    """Serve a no-op at ``/``; without the defaults if the environment asks for the bare path."""
    if bare_path.is_asked_for():
        bare_path.take_the_defaults_out()
    with EmbeddedServer.start() as broker:
        uvloop.run(serve(broker.url, job.port))


if __name__ == "__main__":
    main(parse())
