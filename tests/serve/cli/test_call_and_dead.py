"""``penstock call`` and ``penstock dead``."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from redis import Redis

from tests.handles.site import Site
from tests.handles.test_dead_letters import bury, entry
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import Penstock, environment, on_terminal, running
from tests.support.waiting import wait_until


def answer(request: Any) -> Any:
    if request.data == "bad":
        raise ValueError("not this one")
    return [request.data, dict(request.query_params)] if request.query_params else request.data


def test_a_result_is_written_unchanged(site: Site, penstock: Penstock) -> None:
    site.serve(answer)
    assert penstock("call", "ask", '{"n": [1, null]}').out == '{"n":[1,null]}\n'
    assert penstock("call", "ask", "Ada", "--text").out == "Ada\n"
    assert penstock("call", "ask", "-", stdin="3").out == "3\n"
    assert penstock("call", "ask").out == ""
    assert penstock("call", "ask", "1", "--query", "a=b").out == '[1,{"a":"b"}]\n'
    assert penstock("call", "ask", "1", "--json").lines() == [{"result": 1}]


def test_the_environment_names_the_instance(site: Site, penstock: Penstock, monkeypatch: pytest.MonkeyPatch) -> None:
    site.serve(answer)
    monkeypatch.setenv("PENSTOCK_INSTANCE", "blue")
    ran = penstock("call", "ask", "1")
    assert ran.code != 0
    assert "'ask'" in ran.err
    assert penstock("call", "ask", "1", "--instance", "default").out == "1\n"
    assert "PENSTOCK_INSTANCE" in penstock("call", "--help").out


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        ('{"id":123456789012345678901}', '{"id":123456789012345678901}'),
        ('"\\ud800"', '"\\ud800"'),
        ("[NaN, 1e400]", "[null,null]"),
    ],
)
def test_json_is_read_and_written_by_the_common_rules(site: Site, penstock: Penstock, data: str, answered: str) -> None:
    site.serve(answer)
    for ran in (penstock("call", "ask", f"[{data}]"), penstock("call", "ask", "-", stdin=f"[{data}]")):
        assert (ran.code, ran.out) == (0, f"[{answered}]\n")
    assert penstock("call", "ask", f"[{data}]", "--json").out == f'{{"result":[{answered}]}}\n'


def test_an_argument_that_is_not_utf_8_is_refused(site: Site, penstock: Penstock) -> None:
    site.serve(answer)
    not_text = os.fsdecode(b"caf\xe9")
    for arguments in (
        ("call", "ask", not_text),
        ("call", "ask", not_text, "--text"),
        ("call", "ask", "1", "--query", f"a={not_text}"),
        ("call", not_text, "1"),
        ("call", "ask", "1", "--method", not_text),
        ("call", "ask", "1", "--shard-key", not_text),
        ("batch", "ask", "-", "-o", "-", "--job", not_text),
    ):
        ran = penstock(*arguments)
        assert ran.code == 2, ran
        assert "Traceback" not in ran.err
        assert "is not UTF-8: b'caf\\xe9'" in ran.err or "is not UTF-8: b'a=caf\\xe9'" in ran.err


def test_errors_have_exit_codes(site: Site, penstock: Penstock) -> None:
    site.serve(answer)
    failed = penstock("call", "ask", '"bad"')
    assert (failed.code, failed.out, failed.err) == (1, "", "Error: ValueError: not this one\n")
    assert penstock("call", "ask", '"bad"', "--json").lines()[0]["error"]["type"] == "ValueError"
    for wrong in (("ask", "Ada"), ("nowhere", "1"), ("ask", "1", "--query", "a"), ("ask", "1", "--method", "_x")):
        assert penstock("call", *wrong).code == 2


def test_a_call_without_a_reply_times_out(site: Site, penstock: Penstock) -> None:
    site.declare()
    late = penstock("call", "ask", "1", "--timeout", "0.3")
    assert late.code == 1
    assert "within 0.3 s" in late.err


def test_dead_letters_are_listed_shown_replayed_and_dropped(site: Site, penstock: Penstock) -> None:
    ran: list[Any] = []

    def record(request: Any) -> None:
        ran.append(request.data)

    site.serve(record)
    first, second, third = bury(site, entry(), "it died"), bury(site, None, "garbage"), bury(site, entry())

    listed = penstock("dead", "list", "model")
    assert listed.code == 0
    assert all(id_ in listed.out for id_ in (first, second, third))
    assert [letter["error"] for letter in penstock("dead", "list", "model", "--json").lines()][:2] == [
        "it died",
        "garbage",
    ]
    (shown,) = penstock("dead", "show", "model", first, "--json").lines()
    assert shown["request"]["data"] == "x"
    assert shown["deliveries"][0]["replica"] == "model#1"
    assert "it died" in penstock("dead", "show", "model", first).out

    assert penstock("dead", "replay", "model", first).out == "replayed 1\n"
    wait_until(lambda: ran == ["x"])
    partly = penstock("dead", "replay", "model", "--all")
    assert (partly.code, partly.out) == (1, "replayed 1, 1 failed\n")
    assert "cannot be read" in partly.err
    assert penstock("dead", "drop", "model", second).out == "dropped 1\n"
    assert penstock("dead", "list", "model").out == "backend 'model' has no dead letters\n"


ERROR = "3 replicas of 'model' died with it: " + "and this is what the last one said " * 4


def test_a_pipe_receives_one_line_per_dead_letter(site: Site, penstock: Penstock) -> None:
    site.declare()
    ids = [bury(site, entry(), ERROR), bury(site, entry(), "short")]
    head, *lines = penstock("dead", "list", "model").out.splitlines()
    assert head.split() == ["ID", "DIED", "ENDPOINT", "DELIVERIES", "ERROR"]
    assert [line.split()[0] for line in lines] == ids
    assert [line[head.index("ERROR") :] for line in lines] == [ERROR.strip(), "short"]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_lines_that_fit(site: Site, columns: int) -> None:
    site.declare()
    bury(site, entry(), ERROR)
    environ = {**environment(site.url), "COLUMNS": str(columns)}
    with on_terminal(["dead", "list", "model"], environ, "stdin", "stdout", "stderr") as (p, read):
        shown = b"".join(iter(read, b""))
    assert p.returncode == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[1].strip() == "ERROR"
    said = lines[3:]
    assert len(said) <= 1 + -(-len(ERROR) // (columns - 14)), "it is wrapped more narrowly than it need be"
    assert " ".join(line.strip() for line in said) == ERROR.strip()


def test_unknown_dead_letters_are_refused(site: Site, penstock: Penstock) -> None:
    site.declare()
    assert penstock("dead", "list", "nobody").code == 2
    assert penstock("dead", "show", "model", "1-0").code == 1
    assert penstock("dead", "show", "model", "x").code == 2
    assert penstock("dead", "drop", "model").code == 2


def test_a_missing_permission_is_an_error_of_one_line(site: Site, penstock: Penstock) -> None:
    rules = ("on", "nopass", "-@all", "+ping", "+time", "+select", "+client|setname")
    with Redis.from_url(site.url) as redis:
        redis.execute_command("ACL", "SETUSER", "guest", "reset", *rules)
        try:
            ran = penstock("dead", "list", "model", url=site.url.replace("unix://", "unix://guest:x@"))
        finally:
            redis.execute_command("ACL", "DELUSER", "guest")
    assert ran.code == 1
    assert ran.err.startswith("Error: the Redis user 'guest' may not do "), ran.err
    assert ran.err.count("\n") == 1


def tell(request: Any) -> Any:
    yield from ("water ", b"flows\n", {"part": 3}, None)
    if request.data == "bad":
        raise ValueError("not this one")


def test_a_stream_is_written_as_it_arrives(site: Site, penstock: Penstock) -> None:
    site.serve(tell)
    assert penstock("call", "ask", "--stream").out == 'water flows\n{"part":3}\n'
    lines = [{"result": "water "}, {"result": "flows\n"}, {"result": {"part": 3}}, {"result": None}]
    assert penstock("call", "ask", "--stream", "--json").lines() == lines


def test_a_stream_that_fails_has_written_what_came_before(site: Site, penstock: Penstock) -> None:
    site.serve(tell)
    failed = penstock("call", "ask", '"bad"', "--stream")
    assert (failed.code, failed.out) == (1, 'water flows\n{"part":3}\n')
    assert failed.err == "Error: ValueError: not this one\n"


def test_a_stream_shows_a_value_before_the_next_one_is_made(site: Site) -> None:
    gate = threading.Event()

    def wait_between(request: Any) -> Any:
        yield "first\n"
        assert gate.wait(60)
        yield "second\n"

    site.serve(wait_between)
    with running(command_line("call", "ask", "--stream"), environment(site.url)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        gate.set()
        assert process.stdout.readline() == "second\n"
        assert process.wait(60) == 0


def test_a_call_of_a_generator_without_stream_names_the_option(site: Site, penstock: Penstock) -> None:
    site.serve(tell)
    assert "`penstock call --stream`" in penstock("call", "ask").err
    for others in (("--submit",), ("--idempotency-key", "k")):
        ran = penstock("call", "ask", "--stream", *others)
        assert (ran.code, "--stream waits for the values" in ran.err or "idempotency_key" in ran.err) == (2, True)
