"""A FastAPI application as a backend: its validation, its documentation and its streams behind the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from penstock import serve


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    yield {"stems": {"waters": "water", "turbines": "turbine"}}  # loaded once in each replica


app = FastAPI(title="Stems", lifespan=lifespan)


class Text(BaseModel):
    words: list[str]


@app.post("/stem")
def stem(text: Text, request: Request) -> list[str]:
    return [request.state.stems.get(word, word) for word in text.words]


@app.get("/spell/{word}")
async def spell(word: str) -> StreamingResponse:
    return StreamingResponse((f"{letter}\n" for letter in word), media_type="text/plain")


def main() -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("stems", serve.asgi(app), config={"num_replicas": 2})
        client.create_endpoint("stems", backend="stems", route="/stems/{path:path}", methods=serve.ALL_METHODS)
        with httpx.Client(base_url=f"{client.http_url}/stems", timeout=10) as http:
            print(http.post("/stem", json={"words": ["waters", "and", "turbines"]}).json())
            print(http.post("/stem", json={"words": 3}).json()["detail"][0]["msg"])
            print(http.get("/spell/ab").text.split())
            print(list(http.get("/openapi.json").json()["paths"]))


if __name__ == "__main__":
    main()
