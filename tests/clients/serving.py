"""An example behind a real HTTP server in this process: what its clients connect to."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from penstock.testing import local
from tests.support.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(code: Any, *arguments: Any, route: str) -> Generator[str]:
    """Serve code on a free port until the end of the block; yield ``host:port``."""
    with local(code, *arguments, route=route) as backend:
        config = uvicorn.Config(backend.app, port=0, lifespan="off", log_level="warning", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            yield f"{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
