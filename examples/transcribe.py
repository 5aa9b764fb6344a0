"""A slow job over HTTP: it is submitted, watched and fetched, although its proxy is killed in the middle."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import httpx

from penstock import serve

WORDS = ["water", "comes", "under", "pressure", "to", "the", "turbines", "and", "leaves", "them", "as", "light"]


def transcribe(request: serve.Request) -> dict[str, Any]:
    """Find a word every quarter of a second, as a slow model would."""
    for n in range(len(WORDS)):
        time.sleep(0.25)
        request.report_progress({"done": n + 1, "of": len(WORDS)})
    return {"file": request.data["file"], "text": " ".join(WORDS)}


def main() -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("transcriber", transcribe)
        client.create_endpoint("transcribe", backend="transcriber", route="/transcribe", methods=["POST"])
        with httpx.Client(base_url=client.http_url or "", timeout=10) as http:
            accepted = http.post("/transcribe", json={"file": "talk.wav"}, headers={"Prefer": "respond-async"})
            location = accepted.headers["location"]
            print(f"{accepted.status_code}: submitted")
            was_killed = False
            while (status := get(http, location).json())["status"] in ("queued", "running"):
                progress = status.get("progress") or {"done": 0, "of": len(WORDS)}
                done, of = progress["done"], progress["of"]
                print(f"\r[{'#' * done}{'.' * (of - done)}] {done} of {of}", end="", flush=True)
                if done >= of // 2 and not was_killed:
                    was_killed = True
                    (proxy,) = client.status()["proxies"].values()
                    os.kill(proxy["pid"], signal.SIGKILL)
                    print(" the proxy is killed", flush=True)
                time.sleep(0.1)
            result = get(http, f"{location}/result")
            print(f"\n{result.status_code}: {result.json()['text']}")


def get(http: httpx.Client, path: str) -> httpx.Response:
    """Get a page; repeat while no proxy answers. Reading is safe to repeat."""
    while True:
        try:
            return http.get(path)
        except httpx.TransportError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
