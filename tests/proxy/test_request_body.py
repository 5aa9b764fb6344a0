import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.proxy.site import Site, running


class TestBodies:
    async def test_small_and_large_bodies_arrive_whole(self, site: Site) -> None:
        await site.endpoint("/")
        for size in (0, 1, 65_536, 300_000):
            assert (await site.http.post("/", content=b"x" * size)).json()["size"] == size

    async def test_chunked_bodies_arrive_whole(self, site: Site) -> None:
        await site.endpoint("/")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 10

        assert (await site.http.post("/", content=chunks())).json()["size"] == 30

    async def test_a_body_that_is_declared_too_long_is_refused_unread(self, redis_url: str) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            assert (await site.http.post("/", content=b"x" * 10)).status_code == 200

            async def unread() -> AsyncIterator[bytes]:
                yield pytest.fail("it was read")

            for length in ("11", "9" * 30):
                response = await site.http.post("/", content=unread(), headers={"content-length": length})
                assert response.status_code == 413
                assert response.headers["connection"] == "close"
                assert response.json()["error"]["type"] == "PayloadTooLarge"
                assert "max_body_bytes is 10" in response.json()["error"]["message"]
            assert len(site.started) == 1

    async def test_a_body_that_becomes_too_long_is_not_read_further(self, redis_url: str) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            sent = 0

            async def chunks() -> AsyncIterator[bytes]:
                nonlocal sent
                while True:
                    sent += 1
                    yield b"x" * 4

            assert (await site.http.post("/", content=chunks())).status_code == 413
            assert sent == 3

    async def test_a_length_that_is_not_a_number_is_refused(self, redis_url: str) -> None:
        async with running(redis_url) as site:  # a server would have refused it before
            await site.endpoint("/")
            response = await site.http.post("/", content=b"x", headers={"content-length": "-1"})
            assert response.status_code == 400
            assert "'-1'" in response.json()["error"]["message"]

    async def test_a_slow_body_is_refused(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=0.2) as site:
            await site.endpoint("/")

            async def slow() -> AsyncIterator[bytes]:
                yield b"x" * 3
                await asyncio.sleep(60)

            response = await asyncio.wait_for(site.http.post("/", content=slow()), 5)
            assert response.status_code == 408
            assert response.headers["connection"] == "close"
            assert "3 bytes" in response.json()["error"]["message"]
            assert not site.started
