"""Metrics of an instance: what they count, which proxy exposes them, and whether Prometheus takes them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.middleware import Middleware

from penstock.broker.queue.stats import RunStats, add_stats
from penstock.broker.registry.reports import BackendStatus, ReplicaReport
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry, Header
from penstock.handles.errors import Overloaded, RequestTimeout
from penstock.proxy.proxy import Proxy
from tests.proxy.site import INSTANCE, Site, running, text
from tests.support.guarded import free_port
from tests.support.waiting import wait_until_async

MONITORING = Path(__file__).parents[3] / "docs" / "monitoring"


@pytest_asyncio.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with running(redis_url) as site:
        yield site


@asynccontextmanager
async def proxy(url: str, name: str, *, node: str = "n1", **options: Any) -> AsyncGenerator[dict[str, Any]]:
    one = Proxy(url, INSTANCE, name, {"port": 0, **options}, node=node)
    try:
        yield await one.ready()
    finally:
        await one.drain(0.2)


async def scrape(url: str) -> list[str]:
    async with httpx.AsyncClient(timeout=30) as http:
        response = await http.get(f"{url}/-/metrics")
    assert response.status_code == 200
    return response.text.splitlines()


def program(name: str) -> str:
    """Return where a program of Prometheus is. Without it the test is skipped; in CI that is a failure."""
    if (path := shutil.which(name)) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {name} on PATH")
    return path


async def fill(site: Site) -> None:
    """Give an instance a value of every metric."""
    await site.endpoint("/a", text("a"), name="alpha")
    await site.endpoint("/b", None, name="beta", max_queued_requests=1)
    assert (await site.http.get("/a")).text == "a"
    stats = RunStats(served=3, failed=1, retried=1, redelivered=1, lease_losses=1, skipped=1)
    stats.count_times(12.0, 3.0)
    stats.count_batch(3)
    registry, connection = site.caller.registry, site.caller.connection
    await add_stats(connection, site.keys, "alpha", stats)
    await connection.send("HINCRBY", site.keys.done("alpha"), "dead:poison", 2)
    await connection.send("HSET", site.keys.submitted("alpha"), "queued:alpha", 0, "running:alpha", 0)
    await connection.send("HSET", site.keys.submitted("alpha"), "succeeded:alpha", 6, "failed:alpha", 1)
    status = BackendStatus(version="1", config_version=1, wanted=2, ready=1, starting=1, restarts=4)
    await registry.put_report("alpha", status)
    await registry.put_report("alpha#1", ReplicaReport(backend="alpha", state="ready", node="n1"))
    await registry.put_report("alpha#2", ReplicaReport(backend="alpha", state="starting"))


async def test_the_page_has_what_replicas_and_the_controller_report(site: Site) -> None:
    await fill(site)
    lines = (await site.http.get("/-/metrics")).text.splitlines()
    expected = {
        'penstock_backend_run_duration_seconds_bucket{backend="alpha",le="0.0025"} 0',
        'penstock_backend_run_duration_seconds_bucket{backend="alpha",le="0.005"} 1',
        'penstock_backend_run_duration_seconds_sum{backend="alpha"} 0.003',
        'penstock_backend_queue_duration_seconds_bucket{backend="alpha",le="0.01"} 0',
        'penstock_backend_queue_duration_seconds_bucket{backend="alpha",le="0.025"} 1',
        'penstock_backend_queue_duration_seconds_sum{backend="alpha"} 0.012',
        'penstock_backend_redelivered_total{backend="alpha"} 1',
        'penstock_backend_retried_total{backend="alpha"} 1',
        'penstock_backend_lease_losses_total{backend="alpha"} 1',
        'penstock_backend_skipped_total{backend="alpha"} 1',
        'penstock_backend_dead_lettered_total{backend="alpha",reason="poison"} 2',
        'penstock_backend_replicas_wanted{backend="alpha"} 2',
        'penstock_backend_replicas{backend="alpha",state="ready"} 1',
        'penstock_backend_replicas{backend="alpha",state="starting"} 1',
        'penstock_node_replicas{backend="alpha",node="n1"} 1',
        'penstock_replica_ready{backend="alpha",replica="alpha#1",node="n1"} 1',
        'penstock_replica_ready{backend="alpha",replica="alpha#2",node=""} 0',
        'penstock_kept_requests{backend="alpha",endpoint="alpha",status="queued"} 0',
        'penstock_kept_requests_total{backend="alpha",endpoint="alpha",status="succeeded"} 6',
        'penstock_kept_requests_total{backend="alpha",endpoint="alpha",status="failed"} 1',
        'penstock_backend_restarts_total{backend="alpha"} 4',
        "penstock_controller_up 0",
        "penstock_broker_connected 1",
        "penstock_broker_reconnects_total 0",
    }
    assert expected - set(lines) == set()
    assert any(re.fullmatch(r"penstock_broker_memory_bytes [1-9]\d+", line) for line in lines)
    assert any(line.startswith("penstock_build_info{version=") for line in lines)


async def test_callers_count_what_ends_without_a_reply(site: Site) -> None:
    await site.endpoint("/b", None, name="beta", max_queued_requests=2)
    endpoint = site.caller.snapshot.endpoints["beta"]
    handle = site.caller

    def call(timeout_s: float | None = None) -> tuple[Any, asyncio.Future[Any]]:
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        header = Header(codec="bytes")
        return handle.dispatch(endpoint, header, b"x", outcome.set_result, timeout_s=timeout_s), outcome

    cancelled, _ = call()
    await cancelled.accepted()
    _, expired = call(timeout_s=0.2)
    _, refused = call()
    assert isinstance(await refused, Overloaded)
    assert isinstance(await expired, RequestTimeout)
    assert cancelled.cancel()

    async def lines() -> set[str]:
        return set((await site.http.get("/-/metrics")).text.splitlines())

    wanted = {f'penstock_backend_{name}_total{{backend="beta"}} 1' for name in ("refused", "expired", "cancelled")}

    async def are_there() -> bool:
        return wanted <= await lines()

    await wait_until_async(are_there)


async def test_the_ages_are_those_of_the_oldest_requests(site: Site) -> None:
    await site.endpoint("/b", None, name="beta")
    assert 'penstock_backend_oldest_request_age_seconds{backend="beta"} 0' in await scrape_text(site)
    sending = asyncio.create_task(site.http.get("/b"))

    async def has_aged() -> bool:
        lines = await scrape_text(site)
        kinds = ("oldest_request_age_seconds", "oldest_queued_age_seconds")
        ages = [
            float(line.split()[1]) for line in lines for kind in kinds if line.startswith(f"penstock_backend_{kind}{{")
        ]
        return len(ages) == 2 and min(ages) > 0.05

    await wait_until_async(has_aged)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def scrape_text(site: Site) -> list[str]:
    return (await site.http.get("/-/metrics")).text.splitlines()


async def test_one_proxy_of_an_instance_exposes_its_backends(site: Site, redis_url: str) -> None:
    """The sum over all proxies is the value."""
    await site.endpoint("/a", text("a"), name="alpha")

    def of_backends(lines: list[str]) -> int:
        return sum(line.startswith("penstock_backend_served_total{") for line in lines)

    async with AsyncExitStack() as running_proxies:
        async with proxy(redis_url, "p1", node="n1") as one:
            two = await running_proxies.enter_async_context(proxy(redis_url, "p2", node="n2"))
            for _ in range(2):
                assert [of_backends(await scrape(where["url"])) for where in (one, two)] == [1, 0]
        assert of_backends(await scrape(two["url"])) == 1  # its owner has ended


async def test_a_scrape_of_a_shared_port_has_the_metrics_of_every_proxy_behind_it(site: Site, redis_url: str) -> None:
    await site.endpoint("/a", text("a"), name="alpha")
    port = free_port()
    options: dict[str, Any] = {"port": port, "proxies_per_node": 2}
    async with proxy(redis_url, "p1", **options) as one, proxy(redis_url, "p2", **options):
        async with httpx.AsyncClient() as http:
            for _ in range(8):
                await http.get(f"{one['url']}/a", headers={"connection": "close"})

        async def has_both() -> bool:
            lines = await scrape(one["url"])
            counts = [
                int(line.split()[1])
                for line in lines
                if line.startswith('penstock_http_requests_total{endpoint="alpha"')
            ]
            gauges = [line for line in lines if line.startswith("penstock_http_requests_in_flight{")]
            return sum(counts) == 8 and len(gauges) == 2

        await wait_until_async(has_both)


async def test_the_names_of_ray_serve_are_there_by_option(redis_url: str) -> None:
    async with running(redis_url, ray_serve_metrics=True) as site:
        await fill(site)
        lines = await scrape_text(site)
    labels = 'deployment="alpha",application="default"'
    assert f"ray_serve_deployment_request_counter_total{{{labels}}} 4" in lines
    assert f"ray_serve_deployment_error_counter_total{{{labels}}} 1" in lines
    assert f'ray_serve_deployment_processing_latency_ms_bucket{{{labels},le="5.0"}} 1' in lines
    assert 'ray_serve_deployment_replica_healthy{deployment="alpha",replica="alpha#1",application="default"} 1' in lines


# -- the admin port


async def test_the_admin_port_has_the_pages_of_operators_alone(site: Site, redis_url: str) -> None:
    await site.endpoint("/a", text("a"), name="alpha")
    async with proxy(redis_url, "p1", admin_port=0) as where, httpx.AsyncClient() as http:
        public, admin = where["url"], where["admin_url"]

        async def status(url: str, page: str) -> int:
            return (await http.get(f"{url}{page}")).status_code

        pages = ("/-/metrics", "/-/routes", "/-/healthz", "/-/livez", "/-/readyz", "/a")
        assert [await status(public, page) for page in pages] == [404, 404, 200, 200, 200, 200]
        assert [await status(admin, page) for page in pages] == [200, 200, 200, 200, 200, 404]
        assert (await http.post(f"{admin}/-/metrics")).status_code == 405
        assert (await http.head(f"{admin}/-/metrics")).status_code == 200


async def test_another_proxy_of_the_node_takes_the_admin_port_over(site: Site, redis_url: str) -> None:
    options: dict[str, Any] = {"port": free_port(), "proxies_per_node": 2, "admin_port": free_port()}
    async with AsyncExitStack() as running_proxies:
        async with proxy(redis_url, "p1", **options) as one:
            two = await running_proxies.enter_async_context(proxy(redis_url, "p2", **options))
            assert one["admin_url"] == f"http://127.0.0.1:{options['admin_port']}"
            assert two["admin_url"] is None

        async def is_there() -> bool:
            try:
                return bool(await scrape(one["admin_url"]))
            except httpx.TransportError:
                return False

        await wait_until_async(is_there)


# -- Prometheus


async def test_promtool_accepts_the_page(site: Site) -> None:
    await fill(site)
    page = (await site.http.get("/-/metrics")).content
    tool = await asyncio.create_subprocess_exec(
        *(program("promtool"), "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, problems = await tool.communicate(page)
    assert (tool.returncode, problems.decode(), out.decode()) == (0, "", "")


def test_the_alert_rules_fire_when_they_should() -> None:
    rules = MONITORING / "alerts_test.yml"
    ran = subprocess.run([program("promtool"), "test", "rules", rules], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


async def test_every_expression_of_board_and_alerts_has_values_in_prometheus(
    site: Site, redis_url: str, tmp_path: Path
) -> None:
    await fill(site)
    board: dict[str, Any] = json.loads((MONITORING / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 30
    async with AsyncExitStack() as running_programs:
        where = await running_programs.enter_async_context(proxy(redis_url, "p1", admin_port=0))
        targets = [{"targets": [where["admin_url"].removeprefix("http://")]}]
        job = {"job_name": "penstock", "metrics_path": "/-/metrics", "static_configs": targets}
        api = await running_programs.enter_async_context(prometheus([job], tmp_path))
        async with httpx.AsyncClient(timeout=30) as http:
            assert (await http.get(f"{where['url']}/a")).status_code == 200

        async def ask(expression: str) -> list[Any]:
            query = expression.replace("$__rate_interval", "30s")
            async with httpx.AsyncClient(timeout=30) as http:
                answer = (await http.get(f"{api}/api/v1/query", params={"query": query})).json()
            assert answer["status"] == "success", (query, answer)
            found: list[Any] = answer["data"]["result"]
            return found

        async def all_have_values() -> bool:
            return all([await ask(expression) for expression in expressions])

        await wait_until_async(all_have_values)
        async with httpx.AsyncClient(timeout=30) as http:
            groups = (await http.get(f"{api}/api/v1/rules")).json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        assert sum(len(group["rules"]) for group in groups) >= 14


@asynccontextmanager
async def prometheus(jobs: list[dict[str, Any]], directory: Path) -> AsyncGenerator[str]:
    """A Prometheus that scrapes once a second, by ``jobs`` of its configuration; the URL of its API."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": jobs,
    }
    file = directory / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    with (directory / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program("prometheus"),
            f"--config.file={file}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
        try:

            async def is_ready() -> bool:
                try:
                    async with httpx.AsyncClient() as http:
                        return (await http.get(f"http://127.0.0.1:{port}/-/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until_async(is_ready)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


# -- the recipe of the page


def recipe(name: str) -> Any:
    """Return the class ``name`` of a snippet of the page."""
    page = (MONITORING.parent / "monitoring.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"class {name}" in block]
    names: dict[str, Any] = {}
    exec(code.partition("serve.start(")[0], names)
    return names[name]


async def test_the_recipe_for_api_keys_lets_only_known_keys_pass(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {name: hashlib.sha256(key).hexdigest() for name, key in (("anna", b"one"), ("bert", b"two"))}
    monkeypatch.setenv("PENSTOCK_API_KEYS", ",".join(f"{name}={digest}" for name, digest in digests.items()))

    def client_name(entry: Entry) -> Reply:
        assert entry.header.scope is not None
        return Reply(entry.id, codec="json", body=json.dumps(entry.header.scope["state"]).encode())

    async with running(redis_url, middlewares=(Middleware(recipe("ApiKeys")),)) as site:
        await site.endpoint("/a", client_name)

        async def ask(*, key: str | None) -> httpx.Response:
            headers = {} if key is None else {"authorization": key}
            return await site.http.get("/a", headers=headers)

        assert (await ask(key="Bearer one")).json() == {"client_name": "anna"}
        assert (await ask(key="bearer two")).json() == {"client_name": "bert"}
        for wrong in (None, "Bearer three", "Basic one", "Bearer", "one", "Bearer " + digests["anna"]):
            refused = await ask(key=wrong)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert (await site.http.get("/-/healthz")).status_code == 200
        assert (await site.http.get("/-/metrics")).status_code == 401
