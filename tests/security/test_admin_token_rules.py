"""Rules for the admin token: with them the dashboard replays and drops dead letters as the user of its proxy."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock import handles
from penstock.broker.wire._fields import LARGE
from penstock.proxy.pages.admin_token import digest_of
from penstock.proxy.proxy import Proxy
from tests.security.site import KEYS, Site
from tests.support.guarded import DOCUMENT, Guarded, documented_rules

TOKEN = "correct-horse-battery-staple"


def rules_for_the_admin_token() -> str:
    """Return the rules of the document that a proxy needs besides its own to replay and drop dead letters."""
    found = re.search(r"need these as well:\n\n```text\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return " ".join(found[1].split())


@asynccontextmanager
async def dashboard(site: Site, broker: Guarded, more_rules: str) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the admin port of a proxy whose user has ``more_rules`` besides those of a proxy."""
    rules = documented_rules()["proxy"].replace("user proxy on", "on").replace("{proxy@*}", "{clerk@*}")
    with Redis.from_url(broker.url("admin")) as redis:
        redis.execute_command("ACL SETUSER", "clerk", *selectors(f"{rules} {more_rules}"))
        options = {"port": 0, "admin_port": 0, "admin_token": digest_of(TOKEN)}
        proxy = Proxy(broker.url("clerk"), "default", "clerk", options)
        try:
            url, authorized = (await proxy.ready())["admin_url"], {"authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=url, headers=authorized, timeout=60) as http:
                yield http
        finally:
            await proxy.drain(0.2)
            redis.acl_deluser("clerk")


def selectors(rules: str) -> list[str]:
    """Return the rules of an ACL as the arguments of a command: each selector, in parentheses, is one."""
    return re.findall(r"\([^)]*\)|[^\s()]+", rules)


async def bury(site: Site, broker: Guarded, *, size: int) -> list[str]:
    """Make four submitted requests dead letters, and return their ids."""
    await site.declare(max_deliveries=1)

    def submit() -> None:
        with handles.connect(broker.url("alice")) as connection:
            handle = connection.get_handle("f")
            for n in range(4):
                handle.submit("x" * size, n=n)

    await asyncio.to_thread(submit)
    with Redis.from_url(broker.url("admin")) as redis:
        entries: Any = redis.xrange(KEYS.requests("f"))
        for _, fields in entries:
            redis.xadd(KEYS.dead("f"), {**fields, b"history": b'{"error": "died", "deliveries": []}'})
        redis.xtrim(KEYS.requests("f"), maxlen=0)
        letters: Any = redis.xrange(KEYS.dead("f"))
    return [letter[0].decode() for letter in letters]


@pytest.mark.parametrize("size", [8, LARGE + 1])
async def test_the_dashboard_replays_and_drops_with_the_rules_for_the_admin_token(
    site: Site, broker: Guarded, size: int
) -> None:
    ids = await bury(site, broker, size=size)
    page = "/-/dashboard/dead-letters"
    async with dashboard(site, broker, rules_for_the_admin_token()) as http:
        listed = (await http.get(page, params={"backend": "f"})).json()["dead_letters"]
        assert [letter["id"] for letter in listed] == ids[::-1]
        for name, some in (("replay", ids[:2]), ("drop", ids[2:])):
            for id_ in some:
                changed = await http.post(f"{page}/{name}", params={"backend": "f", "id": id_})
                assert changed.status_code == 200, changed.text
        async with http.stream("GET", "/-/dashboard/events") as events:
            assert await anext(events.aiter_lines()) == "event: state"
    with Redis.from_url(broker.url("admin")) as redis:
        assert (redis.xlen(KEYS.dead("f")), redis.xlen(KEYS.batch("f"))) == (0, 2)
    assert await asyncio.to_thread(broker.denied) == []


async def test_a_proxy_without_the_rules_for_the_admin_token_lists_dead_letters_and_changes_none(
    site: Site, broker: Guarded
) -> None:
    (id_, *_) = await bury(site, broker, size=8)
    async with dashboard(site, broker, "") as http:
        assert len((await http.get("/-/dashboard/dead-letters", params={"backend": "f"})).json()["dead_letters"]) == 4
        for name in ("replay", "drop"):
            refused = await http.post(f"/-/dashboard/dead-letters/{name}", params={"backend": "f", "id": id_})
            assert refused.status_code == 403
            assert "lacks a permission" in refused.json()["error"]["message"]
    assert await asyncio.to_thread(broker.denied)
