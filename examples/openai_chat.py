"""Chat completions as OpenAI's clients expect them, from a tiny model: whole answers, and tokens as they are made.

    python examples/openai_chat.py

Any client of that API works with ``base_url="http://127.0.0.1:8000/v1"``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import orjson
from starlette.responses import JSONResponse, Response, StreamingResponse

from penstock import serve

MODEL = "bigrams"
TEXT = (
    "a penstock is the channel that brings water under pressure to the turbines . "
    "the turbines turn the pressure of water into motion . "
    "the channel is closed when the turbines rest ."
)


class Bigrams:
    """A language model: after each word comes the one that followed it last in a text."""

    def __init__(self, text: str = TEXT) -> None:
        words = text.split()
        self.following = dict(pairwise(words))

    def tokens(self, prompt: str, limit: int) -> Iterator[str]:
        """Yield the words that follow the last word of the prompt that the model knows."""
        known = [word for word in prompt.lower().split() if word in self.following]
        word = known[-1] if known else "a"
        for _ in range(limit):
            word = self.following.get(word, ".")
            yield word
            if word == ".":
                return


class Chat:
    """The endpoints ``/v1/chat/completions`` and ``/v1/models``."""

    def __init__(self) -> None:
        self.model = Bigrams()

    def __call__(self, request: serve.Request) -> Response:
        path = request.path_params["path"]
        if path == "models":
            return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "us"}]})
        if path != "chat/completions":
            return failure(404, f"there is no /v1/{path}")
        if request.method != "POST":
            return failure(405, "chat/completions takes POST")
        asked: Any = request.data
        if not isinstance(asked, dict) or not asked.get("messages"):
            return failure(400, "messages must be a list of at least one message")
        if asked.get("model") != MODEL:
            return failure(404, f"there is no model {asked.get('model')!r}; there is {MODEL!r}")
        prompt = str(asked["messages"][-1].get("content", ""))
        tokens = self.model.tokens(prompt, int(asked.get("max_tokens") or 32))
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}
        if asked.get("stream"):
            return StreamingResponse(events(about, tokens), media_type="text/event-stream")
        words = list(tokens)
        return JSONResponse(
            {
                **about,
                "object": "chat.completion",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": " ".join(words)},
                        "finish_reason": "stop" if words[-1:] == ["."] else "length",
                    }
                ],
                "usage": {
                    "prompt_tokens": len(prompt.split()),
                    "completion_tokens": len(words),
                    "total_tokens": len(prompt.split()) + len(words),
                },
            }
        )


def events(about: dict[str, Any], tokens: Iterator[str]) -> Iterator[bytes]:
    """Yield server-sent events, one for each token."""
    about = {**about, "object": "chat.completion.chunk"}
    before, last = "", ""
    for last in tokens:
        yield event({**about, "choices": [{"index": 0, "delta": {"content": before + last}, "finish_reason": None}]})
        before = " "
    reason = "stop" if last == "." else "length"
    yield event({**about, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    yield b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)


def failure(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)


def main() -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("chat", Chat)
        client.create_endpoint("chat", backend="chat", route="/v1/{path:path}", methods=["GET", "POST"])
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "What is a penstock ?"}]}
        with httpx.Client(base_url=f"{client.http_url}/v1") as http:
            print(http.post("/chat/completions", json=asked).json()["choices"][0]["message"]["content"])
            with http.stream("POST", "/chat/completions", json={**asked, "stream": True}) as response:
                print(sum(line.startswith("data: ") for line in response.iter_lines()), "events")


if __name__ == "__main__":
    main()
