"""Submitted requests and idempotency keys over HTTP, with real replicas."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse

from penstock import handles
from tests.handles.site import INSTANCE, Gate, Lingering, Site, echo
from tests.proxy.pages.submitting import Proxies, proxies, route
from tests.support.waiting import wait_until

ASYNC = {"prefer": "respond-async"}


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(lambda run, data: {"run": run})
    yield gate
    gate.is_open.set()


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    site = Site(redis_url)
    yield site
    site.close()


@pytest.fixture
def started(site: Site) -> Iterator[Proxies]:
    with proxies(site.url) as started:
        yield started


@pytest.fixture
def http(started: Proxies) -> Iterator[httpx.Client]:
    """A client of a proxy."""
    with httpx.Client(base_url=started.start(), timeout=30) as http:
        yield http


@pytest.fixture
def behind(started: Proxies) -> Iterator[httpx.Client]:
    """A client of a proxy with a middleware, whose requests never take the fast path."""
    middlewares = [Middleware(GZipMiddleware, minimum_size=10**9)]
    with httpx.Client(base_url=started.start(middlewares=middlewares), timeout=30) as http:
        yield http


def serve(site: Site, code: Any, path: str = "/ask", **config: Any) -> None:
    site.serve(code, **config)
    route(site, path)


def ready(http: httpx.Client, path: str = "/ask") -> None:
    """Wait until the proxy has the route."""
    wait_until(lambda: path in http.get("/-/routes").json())


# -- submitting


def test_a_request_is_submitted_watched_and_fetched(site: Site, http: httpx.Client, gate: Gate) -> None:
    serve(site, gate)
    ready(http)
    accepted = http.post("/ask?q=1", json={"a": 1}, headers={**ASYNC, "x-request-id": "mine"})
    assert accepted.status_code == 202
    assert accepted.headers["preference-applied"] == "respond-async"
    location = accepted.headers["location"]
    assert location == f"/-/requests/{accepted.json()['id']}"
    assert accepted.json()["status"] == "queued"
    wait_until(lambda: http.get(location).json()["status"] == "running")
    status = http.get(location)
    assert status.headers["retry-after"] == "1"
    assert status.headers["cache-control"] == "no-store"
    assert status.json()["request_id"] == "mine"
    assert status.json()["replica"] == "model#1"
    pending = http.get(f"{location}/result")
    assert (pending.status_code, pending.headers["retry-after"]) == (202, "1")
    gate.is_open.set()
    result = http.get(f"{location}/result", headers={"prefer": "wait=20"})
    assert (result.status_code, result.json()) == (200, {"run": 1})
    assert result.headers["content-type"] == "application/json"
    done = http.get(location)
    assert done.json()["status"] == "succeeded"
    assert "retry-after" not in done.headers
    assert http.head(f"{location}/result").headers["content-length"] == str(len(result.content))


def test_a_client_may_wait_a_while_before_it_comes_back(site: Site, http: httpx.Client, gate: Gate) -> None:
    serve(site, gate, max_concurrent_queries=4)
    ready(http)
    late = http.post("/ask", json=1, headers={"prefer": "respond-async, wait=1"})
    assert late.status_code == 202
    gate.is_open.set()
    prompt = http.post("/ask", json=1, headers={"prefer": "respond-async, wait=20"})
    assert (prompt.status_code, prompt.json()) == (200, {"run": 2})


def test_the_result_is_the_response_as_the_code_gave_it(site: Site, http: httpx.Client) -> None:
    def respond(request: Any) -> Any:
        return PlainTextResponse("short and stout", 418, {"x-pot": "tea"})

    serve(site, respond)
    ready(http)
    response = http.post("/ask", headers={"prefer": "respond-async, wait=20"})
    assert (response.status_code, response.text, response.headers["x-pot"]) == (418, "short and stout", "tea")


def test_an_error_of_the_code_is_a_result(site: Site, http: httpx.Client) -> None:
    def fail(request: Any) -> None:
        raise LookupError("no such thing")

    serve(site, fail)
    ready(http)
    location = http.post("/ask", headers=ASYNC).headers["location"]
    for _ in range(2):
        result = http.get(f"{location}/result", headers={"prefer": "wait=20"})
        assert result.status_code == 500
        assert result.json() == {"error": {"type": "LookupError", "message": "no such thing"}}
    assert http.get(location).json()["error"] == {"type": "LookupError", "message": "no such thing"}


@pytest.mark.parametrize(
    ("code", "content_type", "body"),
    [
        (lambda: iter(()), None, b""),
        (lambda: (word for word in ("a", "é")), "text/plain; charset=utf-8", "aé".encode()),
        (lambda: (n for n in (1, "x" * 300_000, None)), "application/x-ndjson", b'1\n"%s"\nnull\n' % (b"x" * 300_000)),
        (lambda: StreamingResponse(iter(["a", "b"]), media_type="text/csv"), "text/csv; charset=utf-8", b"ab"),
    ],
    ids=["nothing", "text", "values", "response"],
)
def test_a_streamed_response_is_kept_whole(
    site: Site, http: httpx.Client, code: Any, content_type: str | None, body: bytes
) -> None:
    def stream(request: Any) -> Any:
        made = code()
        return made if isinstance(made, StreamingResponse) else (value for value in made)

    serve(site, stream)
    ready(http)
    plain = http.get("/ask")
    kept = http.get("/ask", headers={"prefer": "respond-async, wait=20"})
    assert (kept.status_code, kept.content) == (plain.status_code, plain.content) == (200, body)
    assert kept.headers.get("content-type") == plain.headers.get("content-type") == content_type


def test_a_streamed_response_that_is_too_long_is_an_error(site: Site, started: Proxies) -> None:
    def stream(request: Any) -> Any:
        yield from ("x" * 1000 for _ in range(200))

    serve(site, stream)
    with httpx.Client(base_url=started.start(max_body_bytes=100_000), timeout=30) as http:
        ready(http)
        response = http.get("/ask", headers={"prefer": "respond-async, wait=20"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "PayloadTooLarge"
        assert "max_body_bytes is 100000" in response.json()["error"]["message"]


def test_large_bodies_are_submitted_and_fetched(site: Site, http: httpx.Client) -> None:
    serve(site, echo)
    ready(http)
    body = bytes(range(256)) * 8192
    location = http.post("/ask", content=body, headers=ASYNC).headers["location"]
    result = http.get(f"{location}/result", headers={"prefer": "wait=20"})
    assert result.content == body
    keyed = {"idempotency-key": "large"}
    assert http.post("/ask", content=body, headers=keyed).content == body
    assert http.post("/ask", content=body, headers=keyed).content == body
    assert http.post("/ask", content=body[1:], headers=keyed).status_code == 422


@pytest.mark.parametrize("malformed", ["respond async", '"respond-async"', "respond-async=1", "wait=5", ",;=", ""])
def test_a_malformed_or_unknown_preference_is_ignored(site: Site, http: httpx.Client, malformed: str) -> None:
    serve(site, echo)
    ready(http)
    response = http.post("/ask", json=1, headers={"prefer": malformed})
    assert (response.status_code, response.json()) == (200, 1)
    assert "preference-applied" not in response.headers


def test_a_prefix_of_the_proxy_is_part_of_the_location(site: Site, started: Proxies) -> None:
    serve(site, echo)
    with httpx.Client(base_url=started.start(root_path="/v1"), timeout=30) as http:
        ready(http)
        location = http.post("/v1/ask", json=1, headers=ASYNC).headers["location"]
        assert location.startswith("/v1/-/requests/")
        assert http.get(f"{location}/result", headers={"prefer": "wait=20"}).json() == 1


def test_any_proxy_and_any_handle_answers_for_an_id(site: Site, started: Proxies) -> None:
    serve(site, echo)
    one, two = started.start(), started.start()
    with httpx.Client(timeout=30) as http:
        wait_until(lambda: "/ask" in http.get(f"{one}/-/routes").json())
        submitted = http.post(f"{one}/ask", json=[1], headers=ASYNC).json()
        result = http.get(f"{two}/-/requests/{submitted['id']}/result", headers={"prefer": "wait=20"})
        assert result.json() == [1]
        with handles.connect(site.url, INSTANCE) as connection:
            assert connection.submitted(submitted["id"]).result(timeout=10) == [1]
            theirs = connection.get_handle("ask").submit("text")
        assert http.get(f"{two}/-/requests/{theirs.id}/result", headers={"prefer": "wait=20"}).text == "text"


def test_requests_are_submitted_and_repeated_behind_a_middleware(site: Site, behind: httpx.Client) -> None:
    serve(site, echo)
    ready(behind)
    location = behind.post("/ask", json=1, headers=ASYNC).headers["location"]
    assert behind.get(f"{location}/result", headers={"prefer": "wait=20"}).json() == 1
    assert behind.get(location).json()["status"] == "succeeded"
    assert behind.delete(location).status_code == 409
    for replayed in (None, "true"):
        response = behind.post("/ask", json=2, headers={"idempotency-key": "k"})
        assert (response.json(), response.headers.get("idempotency-replayed")) == (2, replayed)


# -- cancelling, and what there is not


def test_a_submitted_request_is_cancelled(site: Site, http: httpx.Client) -> None:
    code = Lingering()
    serve(site, code.run)
    ready(http)
    location = http.post("/ask", headers=ASYNC).headers["location"]
    assert code.running.wait(10)
    cancelled = http.delete(location)
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert code.cancelled.wait(10)
    assert http.delete(location).status_code == 200
    assert http.get(location).json()["status"] == "cancelled"
    assert http.get(f"{location}/result").status_code == 410
    assert http.get(f"{location}/result", headers={"prefer": "wait=5"}).status_code == 410


def test_a_request_that_has_ended_cannot_be_cancelled(site: Site, http: httpx.Client) -> None:
    serve(site, echo)
    ready(http)
    location = http.post("/ask", json=1, headers=ASYNC).headers["location"]
    assert http.get(f"{location}/result", headers={"prefer": "wait=20"}).json() == 1
    refused = http.delete(location)
    assert refused.status_code == 409
    assert "has succeeded" in refused.json()["error"]["message"]
    assert http.get(f"{location}/result").json() == 1


@pytest.mark.parametrize("id_", ["", "x", "0" * 48, "f" * 10_000, "%2e%2e", "é"])
def test_an_unknown_id_is_not_found(site: Site, http: httpx.Client, id_: str) -> None:
    serve(site, echo)
    ready(http)
    for path in (f"/-/requests/{id_}", f"/-/requests/{id_}/result"):
        assert http.get(path).status_code == 404
    assert http.delete(f"/-/requests/{id_}").status_code == 404
    assert http.get("/-/requests/" + "0" * 48 + "/body").status_code == 404


def test_an_expired_result_is_gone_and_at_last_unknown(site: Site, http: httpx.Client) -> None:
    serve(site, echo, result_ttl_s=1)
    ready(http)
    location = http.post("/ask", json=1, headers={"prefer": "respond-async"}).headers["location"]
    assert http.get(f"{location}/result", headers={"prefer": "wait=20"}).json() == 1
    wait_until(lambda: http.get(f"{location}/result").status_code == 410)
    assert http.get(location).status_code == 410
    wait_until(lambda: http.get(f"{location}/result").status_code == 404)
    assert http.get(location).status_code == 404


@pytest.mark.parametrize(("path", "allowed"), [("", "GET, HEAD, DELETE"), ("/result", "GET, HEAD")])
def test_the_pages_allow_the_methods_that_they_name(site: Site, http: httpx.Client, path: str, allowed: str) -> None:
    refused = http.post("/-/requests/" + "0" * 48 + path, json=1)
    assert (refused.status_code, refused.headers["allow"]) == (405, allowed)


def test_a_client_that_leaves_the_result_page_leaves_the_request_alone(
    site: Site, http: httpx.Client, gate: Gate
) -> None:
    serve(site, gate)
    ready(http)
    location = http.post("/ask", headers=ASYNC).headers["location"]
    with pytest.raises(httpx.ReadTimeout):
        http.get(f"{location}/result", headers={"prefer": "wait=30"}, timeout=0.2)
    gate.is_open.set()
    assert http.get(f"{location}/result", headers={"prefer": "wait=20"}).json() == {"run": 1}


# -- idempotency keys


def test_a_repeated_request_gets_the_first_response(site: Site, http: httpx.Client, gate: Gate) -> None:
    gate.is_open.set()
    serve(site, gate)
    ready(http)
    first = http.post("/ask?a=1", json={"n": 1}, headers={"idempotency-key": '"order 7"'})
    again = http.post("/ask?a=1", json={"n": 1}, headers={"idempotency-key": '"order 7"'})
    assert (first.status_code, first.json()) == (again.status_code, again.json()) == (200, {"run": 1})
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(gate.runs) == 1


def test_a_key_given_as_a_token_and_as_a_string_is_one_key(site: Site, http: httpx.Client) -> None:
    serve(site, echo)
    ready(http)
    http.post("/ask", json=1, headers={"idempotency-key": "k"})
    again = http.post("/ask", json=1, headers={"idempotency-key": '"k"'})
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"url": "/ask?a=2"},
        {"url": "/ask"},
        {"content": b'{"n":2}'},
        {"content": b'{"n": 1}'},
        {"headers": {"content-type": "text/plain"}},
    ],
    ids=str,
)
def test_another_request_under_the_same_key_is_unprocessable(
    site: Site, http: httpx.Client, change: dict[str, Any]
) -> None:
    serve(site, echo)
    ready(http)
    headers = {"content-type": "application/json", "idempotency-key": "k"}
    request: dict[str, Any] = {"method": "POST", "url": "/ask?a=1", "content": b'{"n":1}', "headers": headers}
    assert http.request(**request).status_code == 200
    changed: dict[str, Any] = {**request, **change, "headers": {**headers, **change.get("headers", {})}}
    other = http.request(**changed)
    assert other.status_code == 422
    assert other.json()["error"]["type"] == "IdempotencyConflict"


def test_clients_with_different_credentials_never_share_a_key(site: Site, http: httpx.Client, gate: Gate) -> None:
    gate.is_open.set()
    serve(site, gate)
    ready(http)
    answers = [
        http.post("/ask", json=1, headers={"idempotency-key": "k", **({"authorization": who} if who else {})}).json()
        for who in ("Bearer alice", "Bearer bob", "", "Bearer alice")
    ]
    assert answers == [{"run": 1}, {"run": 2}, {"run": 3}, {"run": 1}]


@pytest.mark.parametrize("key", ["", '"open', "two words", "k" * 10_240, "a,b"], ids=lambda key: key[:20])
def test_a_malformed_key_is_a_bad_request_and_runs_nothing(
    site: Site, http: httpx.Client, gate: Gate, key: str
) -> None:
    serve(site, gate)
    ready(http)
    refused = http.post("/ask", json=1, headers={"idempotency-key": key})
    assert refused.status_code == 400
    assert "Idempotency-Key" in refused.json()["error"]["message"]
    assert gate.runs == []


def test_an_error_of_the_code_is_replayed(site: Site, http: httpx.Client) -> None:
    runs: list[int] = []

    def fail(request: Any) -> None:
        runs.append(1)
        raise ValueError("no")

    serve(site, fail)
    ready(http)
    for _ in range(3):
        assert http.post("/ask", headers={"idempotency-key": "k"}).status_code == 500
    assert runs == [1]


def test_a_refused_request_leaves_its_key_free(site: Site, http: httpx.Client) -> None:
    site.declare(max_queued_requests=1)
    route(site, "/ask")
    ready(http)
    waiting = http.post("/ask", json=0, headers=ASYNC)
    assert waiting.status_code == 202
    refused = http.post("/ask", json=1, headers={"idempotency-key": "k"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    http.delete(waiting.headers["location"])
    site.serve(echo, max_queued_requests=10)
    route(site, "/ask")
    wait_until(lambda: http.post("/ask", json=2, headers={"idempotency-key": "k"}).status_code == 200)


def test_a_client_that_disconnects_does_not_cancel_a_request_with_a_key(
    site: Site, http: httpx.Client, gate: Gate
) -> None:
    serve(site, gate)
    ready(http)
    headers = {"idempotency-key": "k"}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/ask", json=1, headers=headers, timeout=0.2)
    wait_until(lambda: gate.runs)
    gate.is_open.set()
    again = http.post("/ask", json=1, headers=headers)
    assert (again.json(), again.headers["idempotency-replayed"]) == ({"run": 1}, "true")


def test_a_key_may_be_submitted_first_and_waited_for_later(site: Site, http: httpx.Client, gate: Gate) -> None:
    serve(site, gate)
    ready(http)
    headers = {"idempotency-key": "k"}
    first = http.post("/ask", json=1, headers={**headers, **ASYNC})
    again = http.post("/ask", json=1, headers={**headers, **ASYNC})
    assert first.headers["location"] == again.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    gate.is_open.set()
    assert http.post("/ask", json=1, headers=headers).json() == {"run": 1}


def test_the_same_key_through_four_proxies_at_once_is_run_once(site: Site, started: Proxies, gate: Gate) -> None:
    serve(site, gate, max_concurrent_queries=100)
    urls = [started.start() for _ in range(4)]
    with httpx.Client(timeout=30, limits=httpx.Limits(max_connections=100)) as http:
        for url in urls:
            wait_until(lambda url=url: "/ask" in http.get(f"{url}/-/routes").json())  # type: ignore[misc]

        def post(n: int) -> httpx.Response:
            return http.post(f"{urls[n % 4]}/ask", json={"n": 7}, headers={"idempotency-key": "one"})

        with ThreadPoolExecutor(100) as pool:
            responses = [pool.submit(post, n) for n in range(100)]
            wait_until(lambda: gate.runs)
            gate.is_open.set()
            got = [response.result() for response in responses]
    assert {(response.status_code, response.text) for response in got} == {(200, '{"run":1}')}
    assert len(gate.runs) == 1
    assert sum("idempotency-replayed" not in response.headers for response in got) == 1


def test_no_id_and_no_key_is_shown_in_the_log(site: Site, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    def fail(request: Any) -> None:
        raise ValueError("no")

    serve(site, fail)
    ready(http)
    location = http.post("/ask", headers={**ASYNC, "idempotency-key": "secret-key"}).headers["location"]
    assert http.get(f"{location}/result", headers={"prefer": "wait=20"}).status_code == 500
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("penstock")]
    assert not [line for line in ours if location[-48:] in line or "secret-key" in line]
