import re

import pytest

from tests.proxy.site import Site, running


class TestRequestIds:
    async def test_a_request_id_of_the_client_is_echoed_and_forwarded(self, site: Site) -> None:
        await site.endpoint("/")
        response = await site.http.get("/", headers={"x-request-id": "abc-1 2"})
        assert response.headers.get_list("x-request-id") == ["abc-1 2"]
        assert response.json()["request_id"] == "abc-1 2"

    @pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a\tb", b"\xff", "ü".encode()])
    async def test_a_request_id_that_could_forge_a_log_line_is_replaced(self, site: Site, given: bytes | None) -> None:
        await site.endpoint("/")
        headers = {} if given is None else {b"x-request-id": given}
        response = await site.http.get("/", headers=headers)
        assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", made := response.headers["x-request-id"])
        assert response.json()["request_id"] == made

    async def test_a_request_id_with_terminal_escapes_is_replaced(self, redis_url: str) -> None:
        async with running(redis_url) as site:  # a server would have refused it before
            await site.endpoint("/")
            response = await site.http.get("/", headers={b"x-request-id": b"a\x1b[31m"})
            assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", response.headers["x-request-id"])

    async def test_errors_and_system_pages_have_a_request_id(self, site: Site) -> None:
        await site.endpoint("/a")
        for method, path in [
            ("GET", "/none"),
            ("PUT", "/a"),
            ("GET", "/-/healthz"),
            ("GET", "/-/none"),
            ("GET", "/a/"),
        ]:
            response = await site.http.request(method, path, headers={"x-request-id": "me"})
            assert response.headers["x-request-id"] == "me"

    async def test_request_ids_are_unique(self, site: Site) -> None:
        made = {(await site.http.get("/")).headers["x-request-id"] for _ in range(100)}
        assert len(made) == 100
