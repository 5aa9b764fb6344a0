"""``penstock call --submit``, ``result``, ``cancel`` and ``requests``."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.handles.site import Site, echo
from tests.serve.cli.conftest import Penstock


def test_a_call_is_submitted_and_its_result_written_later(site: Site, penstock: Penstock) -> None:
    site.declare()
    id_ = penstock("call", "ask", '{"n":[1,null]}', "--submit").out.strip()
    waiting = penstock("result", id_)
    assert (waiting.code, waiting.out) == (2, "")
    assert "the request is queued and has no result yet; --wait waits for it" in waiting.err
    late = penstock("result", id_, "--wait", "0.1")
    assert late.code == 1
    assert "within 0.1 s" in late.err
    site.serve(echo)
    assert penstock("result", id_, "--wait").out == '{"n":[1,null]}\n'
    assert penstock("result", "--wait", id_).out == '{"n":[1,null]}\n'
    assert penstock("result", "--wait", "30", id_).out == '{"n":[1,null]}\n'
    assert penstock("result", id_).out == '{"n":[1,null]}\n'
    assert penstock("result", id_, "--json").lines() == [{"result": {"n": [1, None]}}]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--wait", "5s", "0a"], "Error: Invalid value for '--wait': '5s' is not a number of seconds\n"),
        (["--wait"], "Error: Missing argument 'ID'.\n"),
        ([], "Error: Missing argument 'ID'.\n"),
    ],
)
def test_wrong_arguments_of_result_are_named(penstock: Penstock, arguments: list[str], error: str) -> None:
    ran = penstock("result", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(error)


def test_a_call_with_a_key_runs_once(site: Site, penstock: Penstock) -> None:
    runs: list[Any] = []

    def count(request: Any) -> int:
        runs.append(request.data)
        return len(runs)

    site.serve(count)
    for _ in range(2):
        assert penstock("call", "ask", "7", "--idempotency-key", "k").out == "1\n"
    refused = penstock("call", "ask", "8", "--idempotency-key", "k")
    assert refused.code == 1
    assert "used for another request" in refused.err
    assert penstock("call", "ask", "7", "--idempotency-key", "k" * 256).code == 2


def test_a_submitted_call_is_cancelled_unless_it_has_ended(site: Site, penstock: Penstock) -> None:
    site.declare()
    id_ = penstock("call", "ask", "1", "--submit", "--json").lines()[0]["id"]
    assert penstock("cancel", id_).out == "cancelled\n"
    again = penstock("cancel", id_)
    assert (again.code, again.err) == (1, "Error: the request has ended already: it is cancelled\n")
    cancelled = penstock("result", id_, "--json")
    assert cancelled.code == 1
    assert cancelled.lines()[0]["error"]["type"] == "RequestCancelled"


@pytest.mark.parametrize("command", ["result", "cancel"])
def test_an_unknown_id_is_a_usage_error(site: Site, penstock: Penstock, command: str) -> None:
    site.declare()
    ran = penstock(command, "0" * 48)
    assert ran.code == 2
    assert "there is no submitted request with this id" in ran.err


def test_the_submitted_calls_of_an_endpoint_are_listed(site: Site, penstock: Penstock) -> None:
    go_on = threading.Event()

    def work(request: Any) -> Any:
        request.report_progress({"at": request.data})
        if request.data == "fail":
            raise ValueError("this one")
        assert go_on.wait(20)

    site.serve(work, max_concurrent_queries=2)
    site.declare("other", tag="another")
    ids = [penstock("call", "ask", word, "--text", "--submit").out.strip() for word in ("fail", "wait")]
    assert penstock("result", ids[0], "--wait").code == 1
    lines = penstock("requests", "ask").out.splitlines()
    assert [line.split()[0] for line in lines] == ["ID", *ids]
    assert lines[1].split()[1] == "failed"
    assert lines[1].endswith("ValueError: this one")
    listed = penstock("requests", "ask", "--json").lines()
    assert [one["id"] for one in listed] == ids
    assert listed[0]["error"] == {"type": "ValueError", "message": "this one"}
    go_on.set()
    assert penstock("requests", "other").out == "endpoint 'other' has no submitted requests\n"
    unknown = penstock("requests", "nobody")
    assert unknown.code == 2
    assert "'nobody'" in unknown.err
