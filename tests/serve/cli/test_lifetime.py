"""An instance on the command line: start, deploy, call, status, shutdown."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from penstock import serve
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import Penstock, Ran, environment
from tests.support.waiting import wait_until

APP = """\
backends:
  method:
    import: operator:attrgetter
    args: [method]
    ray_actor_options: {num_cpus: 0.1}
endpoints:
  ask:
    route: /ask
    methods: [GET, POST]
    backend: method
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.yaml").write_text(APP)
    return tmp_path / "app.yaml"


@pytest.fixture
def running(cluster: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, penstock: Penstock) -> Iterator[Ran]:
    """The outcome of starting an instance in the background."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    yield penstock("start", "--http-port", "0", "--json")
    penstock("shutdown", "--yes")


def test_an_instance_from_start_to_shutdown(running: Ran, app: Path, penstock: Penstock, redis_url: str) -> None:
    assert running.code == 0, running.err
    url = running.lines()[0]["http_url"]

    for answer, said in (
        ("n\n", "the instance 'default' continues to run"),
        ("", "standard input has no answer to the confirmation: give --yes"),
    ):
        kept = penstock("shutdown", stdin=answer)
        assert (kept.code, said in kept.err) == (2, True)

    refused = penstock("start", "--http-port", "0")
    assert (refused.code, "already running" in refused.err) == (2, True)

    needless = penstock("start", "--http-port", "0", "--if-needed")
    assert (needless.code, needless.out) == (0, f"instance 'default' is already running, and serves on {url}\n")

    checked = penstock("deploy", app, "--check")
    assert checked.code == 0, checked.err
    assert "+ create backend method: operator:attrgetter, 1 replica" in checked.out
    assert "nothing was changed" in checked.out
    assert penstock("status", "--json").lines()[0]["backends"] == {}

    deployed = penstock("deploy", app)
    assert deployed.code == 0, deployed.err
    assert deployed.out.splitlines()[-1] == "2 changes made"
    assert httpx.post(f"{url}/ask").text == "POST"
    again = penstock("deploy", app)
    assert again.out == "nothing to change\n"
    assert "compared backend method: the declaration, the source of operator" in again.err
    restart = penstock("deploy", app, "--restart", "method", "--check")
    assert restart.out.splitlines()[0] == "~ update backend method: restart"
    refused = penstock("deploy", app, "--restart", "methods")
    assert (refused.code, "--restart methods: " in refused.err) == (2, True)

    assert penstock("call", "ask").out == "GET\n"
    assert penstock("call", "ask", "--json").lines() == [{"result": "GET"}]
    rows = penstock("batch", "ask", "-", "-o", "-", "--quiet", stdin="1\n2\n")
    assert sorted(line["index"] for line in rows.lines()) == [0, 1]

    with serve.connect(redis_url) as client:
        wait_until(lambda: client.status()["backends"]["method"]["served"] == 5)
        shown = str(client.status())
    assert penstock("status").out == f"{shown}\n"
    assert "/ask" in shown
    (status,) = penstock("status", "--json").lines()
    assert [status["backends"]["method"][count] for count in ("ready", "served", "failed")] == [1, 5, 0]
    assert status["endpoints"]["ask"]["route"] == "/ask"
    with subprocess.Popen(
        command_line("status", "--watch", "--json", "--every", "0.1"),
        stdout=subprocess.PIPE,
        env=environment(redis_url),
    ) as watching:
        assert watching.stdout is not None
        for _ in range(3):
            assert "method" in orjson.loads(watching.stdout.readline())["backends"]
        watching.terminate()

    app.write_text(APP.replace("/ask", "/other").replace("ray_actor", "config: {num_replicas: 2}\n    ray_actor"))
    changed = penstock("deploy", app, "--json")
    assert changed.code == 0, changed.err
    assert [(c["verb"], c["name"]) for c in changed.lines()[0]["changes"]] == [
        ("configure", "method"),
        ("update", "ask"),
    ]
    assert httpx.get(f"{url}/other").text == "GET"
    assert httpx.get(f"{url}/ask").status_code == 404

    app.write_text("backends: {}\n")
    assert penstock("deploy", app).out == "nothing to change\n"
    assert penstock("deploy", app, "--prune").out.splitlines()[-1] == "2 changes made"
    assert httpx.get(f"{url}/other").status_code == 404

    ended = penstock("shutdown", "--yes")
    assert (ended.code, ended.out) == (0, "instance 'default' has ended\n")
    gone = penstock("status")
    assert (gone.code, "there is no instance 'default'" in gone.err) == (2, True)


MISTAKES = """\
backends:
  sound:
    import: operator:attrgetter
  path:
    import: operator
    config: {num_replicas: 0, max_batch_sise: 3}
    ray_actor_options: {cpus: 1}
  "bad name":
    import: operator:attrgetter
  other:
    imports: operator:attrgetter
endpoints:
  ask:
    route: ask
    methods: [FETCH]
    backend: nobody
  weigh:
    route: /weigh
    traffic: {sound: 0.4}
  ask:
    route: /other
"""


def test_a_file_with_mistakes_is_refused_with_all_of_them_by_line(running: Ran, app: Path, penstock: Penstock) -> None:
    app.write_text(MISTAKES)
    lines = [5, 6, 6, 7, 8, 10, 11, 14, 15, 16, 19, 20]
    refused = penstock("deploy", app)
    assert refused.code == 2
    *mistakes, last = refused.err.splitlines()
    assert [line.partition(": ")[0] for line in mistakes] == [f"{app}, line {number}" for number in lines]
    assert last == "nothing was changed"
    assert [mistake["line"] for mistake in penstock("deploy", app, "--json").lines()[0]["mistakes"]] == lines
    assert penstock("status", "--json").lines()[0]["backends"] == {}


def test_a_file_that_cannot_be_read_changes_nothing(running: Ran, tmp_path: Path, penstock: Penstock) -> None:
    (tmp_path / "app.bin").write_bytes(b"\xff\xfe")
    for name, said in (
        ("none.yaml", f"Error: {tmp_path / 'none.yaml'}: No such file or directory\n"),
        ("", f"Error: {tmp_path}: Is a directory\n"),
        ("app.bin", f"Error: {tmp_path / 'app.bin'} is not text: "),
    ):
        refused = penstock("deploy", tmp_path / name)
        assert (refused.code, refused.err[: len(said)]) == (2, said)
    refused = penstock("deploy", "-", stdin="backends: [")
    assert (refused.code, refused.err.startswith("standard input, line 1: this is not YAML")) == (2, True)


class Listens:
    """Connects to ``port`` in its constructor, and waits for an answer."""

    def __init__(self, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.recv(1)

    def __call__(self, request: object) -> None: ...


def test_a_deployment_that_is_interrupted_leaves_nothing(
    running: Ran, app: Path, penstock: Penstock, redis_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path, port = "tests.serve.cli.test_lifetime:Listens", silent.getsockname()[1]
        app.write_text(APP.replace("operator:attrgetter", path).replace("[method]", f"[{port}]"))
        with subprocess.Popen(
            command_line("deploy", str(app)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(redis_url)
        ) as deploying:
            silent.settimeout(150)  # a busy machine takes long to start an actor
            waiting, _ = silent.accept()
            deploying.send_signal(signal.SIGINT)
            _, err = deploying.communicate(timeout=60)
            waiting.close()
    # A line that the backend is still starting may come first on a busy machine.
    assert (deploying.returncode, err.decode().strip().splitlines()[-1]) == (130, "interrupted")
    (status,) = penstock("status", "--json").lines()
    assert (status["backends"], status["endpoints"]) == ({}, {})


def test_code_that_cannot_start_is_an_error_and_leaves_nothing(running: Ran, app: Path, penstock: Penstock) -> None:
    app.write_text(APP.replace("operator:attrgetter", "nowhere:Model"))
    failed = penstock("deploy", app)
    assert failed.code == 1
    assert "No module named 'nowhere'; name the directory of a module of yours as working_dir" in failed.err
    assert "0 of 2 changes made" in failed.err
    (status,) = penstock("status", "--json").lines()
    assert (status["backends"], status["endpoints"]) == ({}, {})

    app.write_text(APP)
    assert penstock("deploy", app).code == 0
    app.write_text(APP.replace("operator:attrgetter", "nowhere:Model"))
    assert penstock("deploy", app).code == 1
    wait_until(lambda: "method refused version" in (shown := penstock("status").out) and "nowhere" in shown)
    assert penstock("call", "ask").out == "GET\n"


def test_a_missing_broker_url_is_an_error_that_names_the_variable(penstock: Penstock) -> None:
    for command in (("start",), ("status",), ("shutdown",), ("call", "ask"), ("dead", "list", "model")):
        refused = penstock(*command, url="")
        assert refused.code == 2
        assert "PENSTOCK_REDIS_URL" in refused.err


def test_the_broker_is_checked_before_ray(penstock: Penstock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refused = penstock("start", url=f"unix://{tmp_path}/nothing.sock")
    assert refused.code == 3
    assert "is unavailable" in refused.err


def test_every_command_has_a_help(penstock: Penstock) -> None:
    for command in ("start", "deploy", "status", "call", "batch", "dead", "shutdown"):
        shown = penstock(command, "--help")
        assert shown.code == 0
        assert "Usage" in shown.out
    assert penstock("frobnicate").code == 2
