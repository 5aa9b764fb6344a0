"""A FastAPI application that calls a backend by a handle: pages and logins here, models in the replicas.

    python app.py &   # the backend of docs/quickstart.md, which prints the next line
    export PENSTOCK_REDIS_URL=…
    uvicorn --app-dir examples --port 8080 web:app
    curl 'http://127.0.0.1:8080/reviews?text=a%20good%20day'

The application needs neither Ray nor the ``serve`` extra.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from penstock import handles
from penstock.handles.errors import Overloaded, PenstockError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    connection = await asyncio.to_thread(handles.connect)
    try:
        sentiment = connection.get_handle("sentiment", sync=False, missing_ok=True).options(timeout_s=10)
        yield {"sentiment": sentiment}  # request.state.sentiment
    finally:
        await asyncio.to_thread(connection.close)


app = FastAPI(lifespan=lifespan)


@app.get("/reviews")
async def review(text: str, request: Request) -> dict[str, Any]:
    future = await request.state.sentiment.remote({"text": text})  # durably queued
    return {"text": text, **await future}


@app.exception_handler(PenstockError)
async def refused(request: Request, error: PenstockError) -> JSONResponse:
    """Answer with the status that HTTP has for the error, such as 503 for a full queue."""
    retry_after = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, Overloaded) else {}
    return JSONResponse({"error": str(error)}, error.status, retry_after)
