import asyncio

from penstock.broker.queue.stats import RunStats, add_stats
from penstock.broker.registry.records import Change, EndpointRecord
from penstock.broker.transport.connection import RedisConnection
from tests.proxy.site import Site, running, text
from tests.support.waiting import wait_until_async


class TestSystemPages:
    async def test_routes(self, site: Site) -> None:
        await site.endpoint("/a/{x:int}", name="a", methods=("GET",))
        await site.endpoint("/b", name="b", methods=("POST",))
        await site.endpoint(None, name="c")
        assert (await site.http.get("/-/routes")).json() == {
            "/a/{x:int}": {"endpoint": "a", "methods": ["GET", "HEAD"]},
            "/b": {"endpoint": "b", "methods": ["POST"]},
        }

    async def test_routes_follow_the_registry(self, site: Site) -> None:
        await site.endpoint("/a", text("a"))
        assert (await site.http.get("/a")).text == "a"
        await site.change(Change({}, {"e": EndpointRecord(name="e", route="/b", traffic={"e": 1.0})}))
        assert (await site.http.get("/a")).status_code == 404
        assert (await site.http.get("/b")).text == "a"
        await site.change(Change({}, {"e": None}))
        assert (await site.http.get("/b")).status_code == 404

    async def test_health(self, site: Site) -> None:
        response = await site.http.get("/-/healthz")
        assert (response.status_code, response.text) == (200, "ok")
        site.app.draining = True
        response = await site.http.get("/-/healthz")
        assert (response.status_code, response.text) == (503, "draining")
        assert response.headers["connection"] == "close"

    async def test_a_draining_proxy_is_alive_and_not_ready(self, site: Site) -> None:
        for draining, ready in ((False, (200, "ok")), (True, (503, "draining"))):
            site.app.draining = draining
            response = await site.http.get("/-/readyz")
            assert (response.status_code, response.text) == ready
            response = await site.http.get("/-/livez")
            assert (response.status_code, response.text) == (200, "ok")

    async def test_metrics(self, site: Site) -> None:
        await site.endpoint("/a", name="alpha")
        for path in ("/a", "/a", "/none"):
            await site.http.get(path)
        response = await site.http.get("/-/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = response.text.splitlines()
        assert 'penstock_http_requests_total{endpoint="alpha",status="200"} 2' in lines
        assert 'penstock_http_requests_total{endpoint="",status="404"} 1' in lines
        assert 'penstock_http_request_duration_seconds_bucket{endpoint="alpha",le="+Inf"} 2' in lines
        assert 'penstock_http_request_duration_seconds_count{endpoint="alpha"} 2' in lines
        assert "penstock_http_requests_in_flight 0" in lines
        assert 'penstock_backend_requests_queued{backend="alpha"} 0' in lines
        assert 'penstock_backend_served_total{backend="alpha"} 0' in lines  # only replicas count these
        assert (await site.http.head("/-/metrics")).headers["content-type"] == response.headers["content-type"]

    async def test_metrics_of_backends_come_from_the_broker(self, site: Site) -> None:
        await site.endpoint("/a", None, name="alpha")
        pending = asyncio.create_task(site.http.get("/a"))

        async def is_queued() -> bool:
            return await site.queued("alpha") == 1

        await wait_until_async(is_queued)
        connection = await RedisConnection(site.caller.url).open()
        try:
            await add_stats(connection, site.keys, "alpha", RunStats(3, 2, 12.5, 7, {1: 1, 4: 2}))
            await add_stats(connection, site.keys, "alpha", RunStats(1, run_ms=2.5, retried=3))
        finally:
            await connection.close()
        lines = (await site.http.get("/-/metrics")).text.splitlines()
        expected = {
            'penstock_backend_requests_queued{backend="alpha"} 1',
            'penstock_backend_requests_in_progress{backend="alpha"} 0',
            'penstock_backend_queued_bytes{backend="alpha"} 4096',
            'penstock_backend_dead_letters{backend="alpha"} 0',
            'penstock_backend_dead_letters_dropped_total{backend="alpha"} 0',
            'penstock_backend_served_total{backend="alpha"} 4',
            'penstock_backend_failed_total{backend="alpha"} 2',
            'penstock_backend_run_seconds_total{backend="alpha"} 0.015',
            'penstock_backend_batch_size_bucket{backend="alpha",le="1"} 1',
            'penstock_backend_batch_size_bucket{backend="alpha",le="4"} 3',
            'penstock_backend_batch_size_bucket{backend="alpha",le="+Inf"} 3',
            'penstock_backend_batch_size_sum{backend="alpha"} 7',
            'penstock_backend_batch_size_count{backend="alpha"} 3',
        }
        assert expected - set(lines) == set()
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)

    async def test_other_reserved_paths_are_404_whatever_the_routes(self, site: Site) -> None:
        await site.endpoint("/{rest:path}")
        assert (await site.http.get("/-/secrets")).status_code == 404
        assert (await site.http.get("/-/")).status_code == 404
        response = await site.http.post("/-/healthz")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
        assert (await site.http.get("/x")).status_code == 200


class TestBelowAPrefix:
    async def test_the_prefix_may_be_stripped_by_a_gateway_or_not(self, redis_url: str) -> None:
        async with running(redis_url, root_path="/serve/") as site:
            await site.endpoint("/a/{x:int}")
            for path in ("/serve/a/1", "/a/1"):
                assert (await site.http.get(path)).json()["path"] == "/serve/a/1"
            assert (await site.http.get("/serve/a/1/")).headers["location"] == "/serve/a/1"
            assert (await site.http.get("/serve/-/healthz")).status_code == 200
            assert (await site.http.get("/served/a/1")).status_code == 404
