"""h2load behind HAProxy with examples/haproxy.cfg, while one of two proxies drains."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

import httpx

from tests.clients.proxies import behind_proxies, program
from tests.clients.serving import EXAMPLES
from tests.support.guarded import free_port
from tests.support.waiting import wait_until_async


@asynccontextmanager
async def haproxy(*proxies: str) -> AsyncGenerator[str]:
    """Run HAProxy before two proxies; yield its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    environ: Mapping[str, str] = {
        **os.environ,
        "PENSTOCK_BIND": url.removeprefix("http://"),
        **{f"PENSTOCK_PROXY_{number}": address for number, address in enumerate(proxies, 1)},
    }
    command = (program("haproxy", "haproxy"), "-db", "-f", str(EXAMPLES / "haproxy.cfg"))
    process = await asyncio.create_subprocess_exec(*command, env=environ)
    try:

        async def serves() -> bool:
            assert process.returncode is None, "HAProxy has ended"
            try:
                async with httpx.AsyncClient() as http:
                    return (await http.get(f"{url}/-/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await wait_until_async(serves)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def test_no_request_of_http_1_or_2_fails_while_a_proxy_behind_haproxy_drains(redis_url: str) -> None:
    load = (program("h2load", "nghttp2-client"), "--duration=5", "--clients=2", "--threads=1")
    started = 0

    def answer(request: object) -> str:
        nonlocal started
        started += 1
        return "x"

    async with (
        behind_proxies(redis_url, answer, name="e", count=2, drain_delay_s=3) as [(leaving, first), (_, second)],
        haproxy(first, second) as url,
    ):
        loads = [
            await asyncio.create_subprocess_exec(*load, *version, f"{url}/e", stdout=asyncio.subprocess.PIPE)
            for version in (("--h1",), ())
        ]
        await wait_until_async(lambda: started > 20)
        await leaving.drain(5.0, 3.0)
        reports = [(await asyncio.wait_for(loading.communicate(), 60))[0].decode() for loading in loads]
    for report, protocol in zip(reports, ("http/1.1", "h2c"), strict=True):
        assert f"Application protocol: {protocol}" in report
        found = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", report)
        assert found is not None, report
        assert [int(number) for number in found.groups()[1:]] == [0, 0, 0], report
        assert f"status codes: {found[1]} 2xx, 0 3xx, 0 4xx, 0 5xx" in report
        assert int(found[1]) > 20
