"""uvicorn and Starlette with the function called in place: no queue, no replica, the floor of any Python server."""

from __future__ import annotations

import asyncio

import uvicorn
from program import NOOP_ANSWER, SLEEP_S, Job, parse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def noop(request: Request) -> Response:
    return JSONResponse(NOOP_ANSWER)


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


async def sleep(request: Request) -> Response:
    await asyncio.sleep(SLEEP_S)
    return JSONResponse(NOOP_ANSWER)


def main(job: Job) -> None:
    """Serve on this process's one loop; ``replicas`` has no meaning here."""
    endpoint = {"noop": noop, "echo": echo, "sleep": sleep}[job.workload]
    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    uvicorn.run(
        app, host="127.0.0.1", port=job.port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main(parse())
