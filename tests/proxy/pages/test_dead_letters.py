"""The dead letters at the admin port: listed to everybody there, replayed and dropped with the admin token alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from penstock.broker.errors import ConfigError
from penstock.broker.wire.requests import Entry, Header
from penstock.proxy.pages.admin_token import digest_of, is_token
from tests.proxy.pages.test_metrics import proxy
from tests.proxy.site import Site, running

TOKEN = "correct-horse-battery-staple"
LIST = "/-/dashboard/dead-letters"


@pytest_asyncio.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with running(redis_url) as site:
        await site.endpoint("/a", None, name="alpha", max_queued_requests=2)
        yield site


async def bury(site: Site, backend: str = "alpha", body: bytes = b'"x"', *, is_readable: bool = True) -> str:
    """Write a dead letter as a replica does, and return its id."""
    history = b'{"error": "every replica died", "deliveries": [{"replica": "alpha#1", "died_ms": 1}]}'
    entry = Entry("caller-1", "gone", Header(endpoint="alpha", codec="json", request_id="r-1"), body)
    fields = entry.fields() if is_readable else [b"garbage", b"\xff"]
    named: dict[Any, Any] = {b"history": history, **dict(zip(fields[::2], fields[1::2], strict=True))}
    return cast("bytes", await site.redis.xadd(site.keys.dead(backend), named)).decode()


def admin(where: dict[str, Any]) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=where["admin_url"], timeout=60)


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def test_the_list_has_the_newest_first_and_no_bodies(site: Site, redis_url: str) -> None:
    first, second = await bury(site, body=b'"a secret"'), await bury(site, is_readable=False)
    async with proxy(redis_url, "p1", admin_port=0) as where, admin(where) as http:
        response = await http.get(LIST, params={"backend": "alpha"})
    assert response.json()["dead_letters"] == [
        {
            "id": second,
            "died_ms": int(second.partition("-")[0]),
            "endpoint": None,
            "request_id": None,
            "error": "every replica died",
            "deaths": ["alpha#1"],
        },
        {
            "id": first,
            "died_ms": int(first.partition("-")[0]),
            "endpoint": "alpha",
            "request_id": "r-1",
            "error": "every replica died",
            "deaths": ["alpha#1"],
        },
    ]
    assert "secret" not in response.text


async def test_who_has_the_token_replays_and_drops(
    site: Site, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock")
    first, second = await bury(site), await bury(site)
    options: dict[str, Any] = {"admin_port": 0, "admin_token": digest_of(TOKEN)}
    async with proxy(redis_url, "p1", **options) as where, admin(where) as http:
        for name, id_ in (("replay", first), ("drop", second)):
            params = {"backend": "alpha", "id": id_}
            done = await http.post(f"{LIST}/{name}", params=params, headers=bearer())
            assert (done.status_code, done.json()["id"]) == (200, id_)
            again = await http.post(f"{LIST}/{name}", params=params, headers=bearer())
            assert (again.status_code, again.json()["error"]["message"]) == (
                409,
                f"backend 'alpha' has no dead letter '{id_}'",
            )
        assert (await http.get(LIST, params={"backend": "alpha"})).json() == {"dead_letters": []}
    assert await site.redis.xlen(site.keys.batch("alpha")) == 1
    assert f"dead letter {first} of backend 'alpha' was replayed at the admin port" in caplog.text
    assert f"dead letter {second} of backend 'alpha' was dropped at the admin port" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"headers": bearer("correct-horse-battery-stapla")},
        {"headers": {"authorization": f"Basic {TOKEN}"}},
        {"headers": {"authorization": TOKEN}},
        {"headers": {"cookie": f"admin_token={TOKEN}"}},
        {"params": {"admin_token": TOKEN, "token": TOKEN}},
        {"headers": bearer(digest_of(TOKEN))},
    ],
)
async def test_without_the_token_in_its_header_nothing_is_changed(
    site: Site, redis_url: str, sent: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    id_ = await bury(site)
    sent = {**sent, "params": {"backend": "alpha", "id": id_, **sent.get("params", {})}}
    options: dict[str, Any] = {"admin_port": 0, "admin_token": digest_of(TOKEN)}
    async with proxy(redis_url, "p1", **options) as where, admin(where) as http:
        for name in ("replay", "drop"):
            refused = await http.post(f"{LIST}/{name}", **sent)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert "Authorization: Bearer" in refused.json()["error"]["message"]
    assert await site.redis.xlen(site.keys.dead("alpha")) == 1
    assert "the admin token is missing or wrong" in caplog.text
    assert TOKEN not in caplog.text


async def test_an_instance_without_a_token_refuses_every_one(site: Site, redis_url: str) -> None:
    id_ = await bury(site)
    async with proxy(redis_url, "p1", admin_port=0) as where, admin(where) as http:
        for token in (TOKEN, "None"):
            refused = await http.post(f"{LIST}/drop", params={"backend": "alpha", "id": id_}, headers=bearer(token))
            assert refused.status_code == 403
            assert "only if the instance has an admin token" in refused.json()["error"]["message"]
    assert await site.redis.xlen(site.keys.dead("alpha")) == 1


async def test_wrong_requests_are_refused_by_name(site: Site, redis_url: str) -> None:
    readable, unreadable = await bury(site), await bury(site, is_readable=False)
    for _ in range(2):
        await site.redis.xadd(site.keys.requests("alpha"), {"filler": "x"})
    options: dict[str, Any] = {"admin_port": 0, "admin_token": digest_of(TOKEN)}
    async with proxy(redis_url, "p1", **options) as where, admin(where) as http:

        async def ask(method: str, name: str = "", **params: str) -> tuple[int, str]:
            response = await http.request(method, f"{LIST}{name}", params=params, headers=bearer())
            return response.status_code, response.json()["error"]["message"]

        assert await ask("GET") == (400, "the query must have backend alone")
        assert await ask("POST", "/drop", backend="alpha") == (400, "the query must have backend and id")
        assert (await ask("GET", backend="nobody"))[0] == 404
        assert (await ask("POST", "/drop", backend="alpha", id="x"))[0] == 400
        assert (await ask("POST", "/burn", backend="alpha", id=readable))[0] == 404
        assert (await ask("GET", "/drop", backend="alpha", id=readable))[0] == 405
        assert (await ask("OPTIONS", "/drop", backend="alpha", id=readable))[0] == 405
        assert (await ask("DELETE", backend="alpha"))[0] == 405
        assert (await ask("POST", "/replay", backend="alpha", id=readable))[0] == 503  # the queue is full
        status, message = await ask("POST", "/replay", backend="alpha", id=unreadable)
        assert status == 409
        assert "cannot be read" in message
        for page in (LIST, f"{LIST}/drop"):
            assert (await http.post(f"{where['url']}{page}", headers=bearer())).status_code == 404
    assert await site.redis.xlen(site.keys.dead("alpha")) == 2


def test_only_the_digest_of_a_token_is_kept_and_compared() -> None:
    digest = digest_of(TOKEN)
    assert digest == f"sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}" == digest_of(digest)
    assert is_token(digest, f"Bearer {TOKEN}".encode())
    assert is_token(digest, f"bearer  {TOKEN} ".encode())
    assert not is_token(digest, b"")
    assert not is_token(digest, f"Bearer {TOKEN}x".encode())


@pytest.mark.parametrize(
    "token", ["", "too-short", "fifteen-chars--", "sixteen chars no", "sixteen-chars-n\u00f6", "sha256:12"]
)
def test_a_token_that_is_weak_or_no_header_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ConfigError, match=r"HTTPOptions\.admin_token") as raised:
        digest_of(token)
    assert not token or token not in str(raised.value)
