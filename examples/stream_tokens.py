"""Text as it is made: a backend that yields words, read over HTTP and through both kinds of handle while it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx

from penstock import serve

STORY = "A penstock is the channel that brings water under pressure to the turbines."


async def tell(request: serve.Request) -> AsyncIterator[str]:
    """Yield a word every 50 ms, as a language model would. A reader that leaves early closes this generator."""
    for word in STORY.split():
        yield word + " "
        await asyncio.sleep(0.05)


def main() -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("teller", tell)
        client.create_endpoint("tell", backend="teller", route="/tell")

        began = time.perf_counter()
        with httpx.stream("GET", f"{client.http_url}/tell") as response:
            for n, text in enumerate(response.iter_text()):
                if n == 0:
                    print(f"the first word came after {time.perf_counter() - began:.2f} s:", end=" ")
                print(text, end="", flush=True)
        print(f"\nthe last after {time.perf_counter() - began:.2f} s")

        handle = client.get_handle("tell").options(stream=True)
        with handle.remote() as words:
            for n, word in enumerate(words):
                print(word, end="", flush=True)
                if n == 3:
                    break  # the end of the block stops the backend
        print()
        asyncio.run(read(client))


async def read(client: serve.Client) -> None:
    handle = client.get_handle("tell", sync=False).options(stream=True)
    async for word in await handle.remote():
        print(word, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
