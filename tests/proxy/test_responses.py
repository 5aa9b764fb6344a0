import json

import pytest

from penstock.broker.wire.replies import Reply
from penstock.handles.errors import BrokerUnavailable, PenstockError
from penstock.proxy.pages.metrics import Metrics
from penstock.proxy.responses import of_error, of_reply, of_status, response_headers


def test_the_address_of_the_broker_is_not_shown() -> None:
    error = BrokerUnavailable("redis://user:secret@inner:6379", "connection refused", retry_after_s=0.1)
    answer = of_error(error, debug=False)
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"1")
    assert json.loads(answer.body) == {"error": {"type": "BrokerUnavailable", "message": "the broker is unavailable"}}
    assert b"connection refused" in of_error(error, debug=True).body


@pytest.mark.parametrize("status", [0, 100, 200, 399, 600])
def test_an_error_is_never_a_success(status: int) -> None:
    error = PenstockError("x")
    error.status = status
    assert of_error(error, debug=False).status == 500


def test_an_error_type_of_a_later_release_is_still_an_error() -> None:
    reply = Reply("1", error={"kind": "NotInventedYet", "args": [1]})
    answer = of_reply(reply, debug=False)
    assert answer.status == 500
    assert b"NotInventedYet" in answer.body


def test_an_unknown_status_has_an_error_type() -> None:
    assert json.loads(of_status(499, "gone").body)["error"]["type"] == "Error"


def test_headers_named_by_connection_are_dropped_in_any_case() -> None:
    headers = [("X-One", "1"), ("connection", "x-oNe , Close"), ("X-Two", "2"), ("PROXY-Connection", "x")]
    assert response_headers(headers) == [(b"x-two", b"2")]


def test_names_in_metrics_cannot_break_out_of_their_quotes() -> None:
    metrics = Metrics()
    metrics.of('a"b\\c\nd').count(200, 0.001)
    text = metrics.render()
    assert r'penstock_http_requests_total{endpoint="a\"b\\c\nd",status="200"} 1' in text.splitlines()


def test_a_bucket_counts_requests_up_to_its_bound() -> None:
    metrics = Metrics()
    for took_s in (0.0005, 0.001, 0.0011, 59.0, 61.0):
        metrics.of("e").count(200, took_s)
    lines = metrics.render().splitlines()
    bucket = 'penstock_http_request_duration_seconds_bucket{endpoint="e",le="%s"} %d'
    for bound, count in [("0.001", 2), ("0.0025", 3), ("30.0", 3), ("60.0", 4), ("+Inf", 5)]:
        assert bucket % (bound, count) in lines
