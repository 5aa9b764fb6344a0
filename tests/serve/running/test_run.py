"""``penstock run``: a script and a function of a module, from the first request through reloads to an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.serve.cli.command_line import command_line
from tests.support.waiting import wait_until

SCRIPT = """
from penstock import serve

def greet(request):
    return "first"

client = serve.start(http_options={"port": 0})
client.create_backend("greeter", greet, ray_actor_options={"num_cpus": 0.1})
client.create_endpoint("greet", backend="greeter", route="/hello")
client.wait()
"""


class Run:
    """A running command."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self._output = process, output

    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.output().count(text) >= times or self.process.poll() is not None)
        assert self.output().count(text) >= times, self.output()

    def get(self, path: str) -> str:
        url = self.output().partition("serving on ")[2].split()[0]
        return httpx.get(url + path).text

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@contextmanager
def running(arguments: Sequence[str], folder: Path, redis_url: str, ray: str) -> Generator[Run]:
    environ = {**os.environ, "PENSTOCK_REDIS_URL": redis_url, "RAY_ADDRESS": ray}
    line, output = command_line("run", "--reload", *arguments), folder / "output"
    with (
        output.open("wb") as writes,
        subprocess.Popen(line, cwd=folder, env=environ, stdout=writes, stderr=writes) as process,
    ):
        try:
            yield Run(process, output)
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_a_script_is_served_and_reloaded_until_it_is_interrupted(cluster: str, redis_url: str, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(SCRIPT)
    with running(["app.py"], tmp_path, redis_url, cluster) as run:
        run.wait_for("GET /hello -> greeter")
        assert run.get("/hello") == "first"

        script.write_text(SCRIPT.replace("first", "second"))
        run.wait_for("reloaded in ")
        assert run.get("/hello") == "second"

        script.write_text(SCRIPT.replace("return", "return return"))
        run.wait_for("app.py was not reloaded: the version before goes on serving")
        assert "app.py, line 5: invalid syntax" in run.output()
        assert run.get("/hello") == "second"

        script.write_text(SCRIPT.replace("first", "third").replace('"greet", backend', '"renamed", backend'))
        run.wait_for("reloaded in ", times=2)
        assert run.get("/hello") == "third"
        assert run.interrupt() == 0
    assert "Traceback" not in run.output()


def test_a_function_of_a_module_is_served_at_the_root(cluster: str, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "penstock_run_app.py").write_text("def greet(request):\n    return request.query_params['name']\n")
    with running(["--http-port", "0", "penstock_run_app:greet"], tmp_path, redis_url, cluster) as run:
        run.wait_for("GET,POST / -> greet")
        assert run.get("/?name=Ada") == "Ada"
        run.process.terminate()
        assert run.process.wait(timeout=60) == 0
    assert "Traceback" not in run.output()
