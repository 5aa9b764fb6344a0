import asyncio
import os
import signal
import socket
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
import pytest
from redis import Redis
from starlette.middleware import Middleware

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import ConfigError
from penstock.broker.registry.records import Change, EndpointRecord
from penstock.broker.registry.reports import ProxyReport
from penstock.broker.wire.keys import Keys
from penstock.proxy.proxy import Proxy
from tests.proxy.site import INSTANCE, Site, running, text
from tests.proxy.test_middleware import Adds
from tests.support.waiting import wait_until_async


@asynccontextmanager
async def proxy(url: str, name: str = "p1", *, node: str = "n1", **options: Any) -> AsyncGenerator[Proxy]:
    proxy = Proxy(url, INSTANCE, name, {"port": 0, **options}, node=node)
    try:
        yield proxy
    finally:
        await proxy.drain(0.2)


async def reports(site: Site) -> dict[str, ProxyReport]:
    return await site.caller.registry.get_reports(ProxyReport)


async def test_a_proxy_serves_and_reports_its_url(site: Site, redis_url: str) -> None:
    await site.endpoint("/{x:int}", text("hello"))
    async with proxy(redis_url) as one, httpx.AsyncClient() as http:
        where = await one.ready()
        assert where["node"] == "n1"
        assert where["pid"] == os.getpid()
        assert (await http.get(f"{where['url']}/1")).text == "hello"
        assert await one.ready() == where
        await one.check()
        await wait_until_async(lambda: _has(site, "p1", {**where, "version": site.caller.snapshot.version}))
    assert (await reports(site))["p1"].url is None


async def test_a_proxy_has_a_lease_while_it_serves(site: Site, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        lease = Keys(INSTANCE).proxy_alive("p1")
        async with proxy(redis_url) as one:
            await one.ready()
            assert 0 < redis.pttl(lease) <= 2000
        assert not redis.exists(lease)


async def test_a_proxy_follows_the_registry_and_reports_the_version(site: Site, redis_url: str) -> None:
    await site.endpoint("/a", text("hello"))
    async with proxy(redis_url) as one, httpx.AsyncClient() as http:
        url = (await one.ready())["url"]
        for n in range(20):
            moved = EndpointRecord(name="e", route=f"/{n}", traffic={"e": 1.0})
            await site.change(Change({}, {"e": moved}))
            await wait_until_async(lambda: _has(site, "p1", {"version": site.caller.snapshot.version}))
            # The reported version is the one that is served.
            assert (await http.get(f"{url}/{n}")).text == "hello"
            assert (await http.get(f"{url}/{n - 1}")).status_code == 404


async def test_options_are_those_of_http_options(site: Site, redis_url: str) -> None:
    await site.endpoint("/", None)
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "max_body_bytes": 3,
        "request_timeout_s": 0.2,
        "root_path": "/base",
        "debug": True,
        "middlewares": [Middleware(Adds, mark="a")],
        "location": "HeadOnly",
        "proxies_per_node": 1,
        "max_connections": 1,
    }
    async with proxy(redis_url, **options) as one, httpx.AsyncClient() as http:
        url = (await one.ready())["url"]
        assert (await http.post(f"{url}/", content=b"1234")).status_code == 413
        response = await http.get(f"{url}/base/")
        assert response.status_code == 504
        assert response.headers["x-mark"] == "a"
        async with httpx.AsyncClient() as another:
            refused = await another.get(f"{url}/base/")
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")


async def test_proxies_of_a_node_share_a_port_however_they_start(site: Site, redis_url: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(proxy(redis_url, f"p{n}", port=port)) for n in range(3)]
        for n in range(3):  # as the controller does before it starts a proxy
            await site.caller.registry.put_report(f"p{n}", ProxyReport(node="n1"))
        where = await asyncio.gather(*(one.ready() for one in proxies))
        assert {report["url"] for report in where} == {f"http://127.0.0.1:{port}"}
        # A fourth one, later.
        late = await stack.enter_async_context(proxy(redis_url, "p4", port=port))
        assert (await late.ready())["url"] == f"http://127.0.0.1:{port}"


async def test_proxies_of_two_nodes_with_the_same_address_share_a_port(site: Site, redis_url: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await site.endpoint("/", text("hello"))
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(proxy(redis_url, f"p{n}", node=f"n{n}", port=port)) for n in range(2)
        ]
        for n in range(2):
            await site.caller.registry.put_report(f"p{n}", ProxyReport(node=f"n{n}"))
        where = await asyncio.gather(*(one.ready() for one in proxies))
        assert [report["node"] for report in where] == ["n0", "n1"]
        assert {report["url"] for report in where} == {f"http://127.0.0.1:{port}"}
        late = await stack.enter_async_context(proxy(redis_url, "p2", node="n2", port=port))
        assert (await late.ready())["url"] == f"http://127.0.0.1:{port}"
        for _ in range(20):  # a new connection each, which either proxy may accept
            async with httpx.AsyncClient() as http:
                assert (await http.get(f"http://127.0.0.1:{port}/")).text == "hello"


async def test_a_port_of_another_process_is_refused_by_name(site: Site, redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # A proxy of another node, at the same port number.
        far = ProxyReport(node="n2", address="192.0.2.2", state="ready", url=f"http://127.0.0.1:{port}")
        await site.caller.registry.put_report("far", far)
        async with proxy(redis_url, port=port) as one:
            for ask in (one.ready, one.ready, one.check):
                with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"):
                    await ask()


async def test_a_proxy_on_all_addresses_reports_the_address_of_its_node(site: Site, redis_url: str) -> None:
    one = Proxy(redis_url, INSTANCE, "p", {"host": "0.0.0.0", "port": 0}, node="n", address="127.0.0.1")
    url = (await one.ready())["url"]
    assert url.startswith("http://127.0.0.1:")
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/-/healthz")).text == "ok"
    await one.drain(1)


async def test_draining_finishes_the_requests_in_progress(site: Site, redis_url: str) -> None:
    release = asyncio.Event()

    async def later(entry: Any) -> Any:
        await release.wait()
        return text("done")(entry)

    await site.endpoint("/", later)
    async with proxy(redis_url) as one, httpx.AsyncClient() as http:
        url = (await one.ready())["url"]
        asked = asyncio.ensure_future(http.get(url))
        await wait_until_async(lambda: site.started)
        draining = asyncio.ensure_future(one.drain(10))
        await wait_until_async(lambda: _has(site, "p1", {"state": "draining"}))
        release.set()
        assert (await asked).text == "done"
        await asyncio.wait_for(draining, 5)


async def test_a_draining_proxy_accepts_connections_until_its_delay_is_over(site: Site, redis_url: str) -> None:
    await site.endpoint("/", text("hello"))
    async with proxy(redis_url) as one:
        url = (await one.ready())["url"]
        draining = asyncio.ensure_future(one.drain(10, 60))
        await wait_until_async(lambda: _has(site, "p1", {"state": "draining"}))
        for path, answer in (("/-/readyz", (503, "draining")), ("/", (200, "hello"))):
            async with httpx.AsyncClient() as http:  # on a new connection
                response = await http.get(url + path)
                assert (response.status_code, response.text) == answer
                assert response.headers["connection"] == "close"
        await asyncio.wait_for(one.drain(10), 5)  # ends the delay of the first one
        await asyncio.wait_for(draining, 5)
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(url)


async def test_readiness_outlasts_an_outage_of_the_broker_that_is_shorter_than_its_limit() -> None:
    with EmbeddedServer.start() as broker, Redis.from_url(broker.url) as redis:
        async with (
            running(broker.url),
            proxy(broker.url, "p1", unready_after_s=600) as patient,
            proxy(broker.url, "p2", unready_after_s=0) as impatient,
            httpx.AsyncClient() as http,
        ):
            urls = [(await one.ready())["url"] for one in (patient, impatient)]
            redis.config_set("min-replicas-to-write", 1)  # there is none, so that every write is refused
            for url in urls:
                await wait_until_async(partial(_answers, http, f"{url}/-/healthz", 503))
                assert await _answers(http, f"{url}/-/livez", 200)
            assert await _answers(http, f"{urls[0]}/-/readyz", 200)
            assert await _answers(http, f"{urls[1]}/-/readyz", 503)
            redis.config_set("min-replicas-to-write", 0)
            await wait_until_async(partial(_answers, http, f"{urls[1]}/-/readyz", 200))


async def test_a_proxy_can_be_drained_before_it_has_started(redis_url: str) -> None:
    one = Proxy(redis_url, INSTANCE, "p", {"port": 0})
    starting = asyncio.ensure_future(one.ready())
    await asyncio.sleep(0)
    await asyncio.wait_for(one.drain(1), 5)
    assert (await asyncio.gather(starting, return_exceptions=True))[0] is not None


async def test_a_proxy_survives_a_broker_that_dies_and_returns_empty() -> None:
    with EmbeddedServer.start() as broker:
        async with running(broker.url) as site, proxy(broker.url) as one, httpx.AsyncClient() as http:
            url = (await one.ready())["url"]
            await site.endpoint("/", None)
            await wait_until_async(lambda: _status(http.put(url), 405))
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            await wait_until_async(lambda: _status(http.get(f"{url}/-/healthz"), 503))
            await wait_until_async(lambda: _status(http.get(f"{url}/-/healthz"), 200))
            await wait_until_async(lambda: _status(http.put(url), 404))
            assert (await reports(site))["p1"].url is not None


async def _has(site: Site, name: str, wanted: dict[str, Any]) -> bool:
    report = (await reports(site)).get(name, ProxyReport())
    return wanted.items() <= asdict(report).items()


async def _answers(http: httpx.AsyncClient, url: str, status: int) -> bool:
    return await _status(http.get(url), status)


async def _status(asked: Awaitable[httpx.Response], status: int) -> bool:
    return (await asked).status_code == status
