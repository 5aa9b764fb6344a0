"""Prometheus with the configuration of docs/monitoring.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.clients.proxies import DOCS, behind_proxies
from tests.proxy.pages.test_metrics import prometheus
from tests.support.waiting import wait_until_async


async def test_the_configuration_of_the_page_scrapes_what_a_proxy_counts(redis_url: str, tmp_path: Path) -> None:
    page = (DOCS / "monitoring.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```yaml\n(scrape_configs:\n.*?)```", page, re.DOTALL)
    jobs: list[dict[str, Any]] = yaml.safe_load(config)["scrape_configs"]

    def answer(request: Any) -> str:
        return "x"

    async with behind_proxies(redis_url, answer, name="e") as [(_, address)]:
        async with httpx.AsyncClient() as http:
            for _ in range(3):
                assert (await http.get(f"http://{address}/e")).text == "x"
        jobs[0]["static_configs"] = [{"targets": [address]}]
        async with prometheus(jobs, tmp_path) as api, httpx.AsyncClient(timeout=30) as http:

            async def are_scraped() -> bool:
                query = {"query": 'sum(penstock_http_requests_total{endpoint="e"})'}
                answer = (await http.get(f"{api}/api/v1/query", params=query)).json()
                return [one["value"][1] for one in answer["data"]["result"]] == ["3"]

            await wait_until_async(are_scraped)
