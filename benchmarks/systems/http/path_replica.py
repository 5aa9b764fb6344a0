"""The replica of ``path_server.py``: the class that a replica's actor is made of, in a plain process."""

from __future__ import annotations

import asyncio
import sys

import bare_path
import uvloop
from path_server import freeze

from penstock.workers.serving import Serving


async def serve(url: str, instance: str, backend: str) -> None:
    """Run it until this process ends."""
    await Serving(url, instance, backend, f"{backend}#1").ready()
    freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    if bare_path.is_asked_for():
        bare_path.take_the_defaults_out()
    uvloop.run(serve(*sys.argv[1:]))
