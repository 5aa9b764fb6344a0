"""The types that checkers see: each assignment here is checked by mypy and pyright, and none needs a cast."""

import concurrent.futures
from typing import Any

from penstock.handles import AsyncResponseStream, AsyncServeHandle, ResponseStream, ServeHandle, StreamingHandle
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Site


def _three(request: Any) -> Any:
    yield from (1, 2, 3)


def test_a_streaming_handle_gives_a_stream(site: Site, connected: Connection) -> None:
    site.serve(_three)
    handle: ServeHandle = connected.get_handle("ask")
    streaming: StreamingHandle = handle.options(stream=True)
    with streaming.remote("prompt") as tokens:
        stream: ResponseStream = tokens
        assert list(stream) == [1, 2, 3]


async def test_an_asyncio_streaming_handle_gives_a_stream(site: Site) -> None:
    site.serve(_three)
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    stream: AsyncResponseStream = await handle.options(stream=True).remote("prompt")
    async with stream as tokens:
        assert [token async for token in tokens] == [1, 2, 3]


def test_options_but_for_stream_keep_the_kind_of_a_handle(site: Site, connected: Connection) -> None:
    site.declare()
    future: concurrent.futures.Future[Any] = connected.get_handle("ask").options(timeout_s=60).remote()
    assert future.cancel()
    streaming: StreamingHandle = connected.get_handle("ask").options(stream=True).options(timeout_s=60)
    plain: ServeHandle = streaming.options(stream=False)
    assert (type(streaming), type(plain)) == (StreamingHandle, ServeHandle)
