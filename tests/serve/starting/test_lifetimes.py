"""Start, end and resumption of instances, attached to a script and detached."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import Client as HTTPClient
from redis import Redis
from redis.exceptions import RedisError

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from penstock.handles.errors import ConfigError, PenstockError
from tests.serve.backends import SMALL, answering, replicas
from tests.support.brokers import wait_until_written
from tests.support.ray_workers import forks_with_ray
from tests.support.waiting import wait_until

StartClient = Callable[..., serve.Client]

NO_HTTP: dict[str, Any] = {"location": None}

SCRIPT = """
import os, signal, sys, time
from penstock import serve

def f(request):
    return os.getpid()

client = serve.start({arguments})
client.create_backend("f", f, config={{"num_replicas": 2}}, ray_actor_options={{"num_cpus": 0.1}})
client.create_endpoint("e", backend="f", route="/e")
replica = client.get_handle("e").remote().result(timeout=30)
proxies = [proxy["pid"] for proxy in client.status()["proxies"].values()]
print("serves", client.redis_url, replica, *proxies, flush=True)
"""


class Script:
    """A Python script in a process and a session of its own.

    It is a fork unless a Python is given. A fork is not in the process group of its launcher, which a terminal
    interrupts.
    """

    def __init__(self, arguments: str, then: str, python: str | Path | None, /, **environment: str) -> None:
        code = SCRIPT.format(arguments=arguments) + textwrap.dedent(then)
        self.process = subprocess.Popen(
            [python or forks_with_ray().python, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        self.redis_url, self.pids = "", list[int]()

    def serves(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serves"):
                _, self.redis_url, *pids = line.split()
                self.pids = [int(pid) for pid in pids]
                return
        pytest.fail(f"the script failed:\n{self.process.stderr.read() if self.process.stderr else ''}")

    def interrupt(self) -> None:
        """Send SIGINT to every process of the group, as Ctrl-C on a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self) -> str:
        """Wait for the end of the script, and return its stderr."""
        return self.process.communicate(timeout=60)[1]

    def nothing_runs(self) -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in self.pids)


@contextmanager
def script(
    arguments: str, then: str = "", python: str | Path | None = None, /, **environment: str
) -> Generator[Script]:
    running = Script(arguments, then, python, **environment)
    try:
        running.serves()
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def keys(url: str) -> list[bytes]:
    with Redis.from_url(url) as redis:
        return cast("list[bytes]", redis.keys("penstock:*"))


def server_pid(url: str) -> int:
    """Return the process id of the server at ``url``, 0 without one."""
    with Redis.from_url(url) as redis:
        try:
            return int(redis.info("server")["process_id"])
        except RedisError:
            return 0


@pytest.fixture
def joined(cluster: str) -> dict[str, str]:
    """The environment of a script that joins the Ray cluster of the tests."""
    return {"RAY_ADDRESS": cluster}


@pytest.mark.parametrize(
    "then", ["", "raise SystemExit(3)", "raise RuntimeError", "client.shutdown()", "with client: pass"]
)
def test_the_instance_ends_with_the_script(then: str, redis_url: str, joined: dict[str, str]) -> None:
    with script(f"redis_url={redis_url!r}, http_options={{'port': 0}}", then, **joined) as running:
        assert "attend" not in running.ended(), "Ray reports the end of the controller as an error"
        wait_until(running.nothing_runs)
        assert keys(redis_url) == []


def test_sigterm_ends_the_instance_and_then_the_script_with_status_143(redis_url: str, joined: dict[str, str]) -> None:
    with script(f"redis_url={redis_url!r}, http_options={{'port': 0}}", "client.wait()", **joined) as running:
        running.process.terminate()
        assert "Traceback" not in running.ended()
        assert running.process.returncode == 143
        wait_until(running.nothing_runs)
        assert keys(redis_url) == []


def test_the_instance_ends_with_ctrl_c(joined: dict[str, str]) -> None:
    with script("http_options={'port': 0}", "time.sleep(60)", sys.executable, **joined) as running:
        running.interrupt()
        assert "KeyboardInterrupt" in running.ended()
        wait_until(running.nothing_runs)
        assert not Path(running.redis_url.removeprefix("unix://")).exists()


def test_the_processes_end_with_a_script_that_is_killed(joined: dict[str, str]) -> None:
    with script("http_options={'port': 0}", "time.sleep(60)", **joined) as running:
        running.process.kill()
        wait_until(running.nothing_runs)
        wait_until(lambda: not Path(running.redis_url.removeprefix("unix://")).exists())


def test_a_ray_that_start_started_ends_too() -> None:
    """The fixture that looks for left processes after all tests checks it."""
    then = """
        client.shutdown()
        import ray
        print(ray.is_initialized(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    with script("http_options={'port': 0}", then, sys.executable, RAY_ADDRESS="") as running:
        assert running.process.stdout is not None
        assert running.process.stdout.read() == "False\n"
        assert "Traceback" not in running.ended()
        assert running.process.returncode == -signal.SIGTERM, "a handler of Ray's is left"
        wait_until(running.nothing_runs)


def test_the_keys_that_a_killed_script_left_in_redis_are_resumed(
    redis_url: str, joined: dict[str, str], start: StartClient
) -> None:
    with script(f"redis_url={redis_url!r}, http_options={{'port': 0}}", "time.sleep(60)", **joined) as running:
        handle = serve.connect(redis_url).get_handle("e")
        running.process.kill()
        wait_until(running.nothing_runs)
        waiting = handle.remote()  # no replica runs, but the request is durably queued
        client = start()
        assert client.list_backends().keys() == {"f"}
        assert waiting.result(timeout=20) not in running.pids


def test_a_detached_instance_outlives_its_script(redis_url: str, joined: dict[str, str]) -> None:
    arguments = f"redis_url={redis_url!r}, detached=True, http_options={{'port': 0}}"
    with script(arguments, "client.close()", **joined) as running:
        running.ended()
        client = serve.connect(redis_url)
        try:
            with HTTPClient() as http:
                answers = {http.get(f"{client.http_url}/e").json() for _ in range(100)}
            assert running.pids[0] in answers
            with serve.connect(redis_url) as other:
                other.create_backend("g", answering("g"), ray_actor_options=SMALL)
            assert client.list_backends().keys() == {"f", "g"}
            complaint = r"the instance 'default' is already running on .*: serve\.connect\(\) connects to it"
            with pytest.raises(ConfigError, match=complaint):
                serve.start(redis_url=redis_url, detached=True)
        finally:
            client.shutdown()
        wait_until(running.nothing_runs)
        assert keys(redis_url) == []


STARTS_DETACHED = """
import sys
from penstock import serve

try:
    serve.start(redis_url=sys.argv[1], detached=True)
except serve.errors.ConfigError as e:
    print(e)
"""


def test_a_detached_instance_is_refused_without_a_ray_that_outlives_it(
    cluster: str, redis_url: str, tmp_path: Path
) -> None:
    """The Ray cluster of the tests ends with them, and was not started by ``ray start``."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    python, env = forks_with_ray().python, {**env, "RAY_TMPDIR": str(tmp_path)}
    said = subprocess.check_output([python, "-c", STARTS_DETACHED, redis_url], text=True, env=env)
    assert "none was started on this machine, and RAY_ADDRESS is not set; `ray start" in said
    assert keys(redis_url) == []


def test_connect_names_what_is_missing(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no instance 'other' on unix://.*; serve\.start\(\) or `penstock start`"
    ):
        serve.connect(redis_url, "other")
    monkeypatch.delenv("PENSTOCK_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match="connect needs a redis_url, or PENSTOCK_REDIS_URL"):
        serve.connect()
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    with pytest.raises(ConfigError, match="no instance"):
        serve.connect()


def test_two_instances_do_not_affect_each_other(start: StartClient, redis_url: str) -> None:
    one, two = start(instance="one"), start(instance="two")
    for client, value in ((one, 1), (two, 2)):
        client.create_backend("f", answering(value), ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f")
    handles = [client.get_handle("e") for client in (one, two)]
    assert [handle.remote().result(timeout=10) for handle in handles] == [1, 2]
    one.shutdown()
    assert handles[1].remote().result(timeout=10) == 2
    assert {key.split(b":")[1] for key in keys(redis_url)} == {b"two"}


def test_a_second_start_is_refused_and_touches_nothing(client: serve.Client, redis_url: str) -> None:
    client.create_backend("f", answering("f"), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f")
    ways_out = r"use the client that serve\.start\(\) returned, or serve\.connect\('unix://.*', 'default'\)"
    cases: list[dict[str, Any]] = [{"redis_url": redis_url}, {}]
    for arguments in cases:
        with pytest.raises(ConfigError, match=f"'default' is already running in this process: {ways_out}"):
            serve.start(**arguments, http_options=NO_HTTP)
    assert client.get_handle("e").remote().result(timeout=10) == "f"


def test_a_name_can_be_used_once_in_a_ray_cluster(client: serve.Client) -> None:
    with EmbeddedServer.start() as other:
        with pytest.raises(ConfigError, match="'default' is already running in this Ray cluster, on another Redis"):
            serve.start(redis_url=other.url, http_options=NO_HTTP)
        assert keys(other.url) == []


def test_a_port_in_use_is_named_and_no_key_is_left(web: serve.Client, redis_url: str) -> None:
    port = int(str(web.http_url).rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"):
        serve.start(redis_url=redis_url, instance="other", http_options={"port": port})
    assert not any(b":other:" in key for key in keys(redis_url))
    with HTTPClient() as http:
        assert http.get(f"{web.http_url}/-/healthz").text == "ok"


def test_a_second_shutdown_does_nothing_and_other_calls_raise(client: serve.Client) -> None:
    client.shutdown()
    client.shutdown()
    with pytest.raises(PenstockError, match="this client of the instance 'default' is closed"):
        client.list_backends()
    assert "closed" in repr(client)


def test_a_data_dir_is_resumed_until_it_is_shut_down(cluster: str, tmp_path: Path) -> None:
    with serve.start(data_dir=tmp_path, http_options=NO_HTTP) as client:
        client.create_backend("f", answering("f"), config={"num_replicas": 2}, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
    with serve.start(data_dir=tmp_path, http_options={"port": 0}) as client:
        assert client.list_backends()["f"].num_replicas == 2
        assert client.get_handle("e").remote().result(timeout=20) == "f"
        with HTTPClient() as http:
            assert http.get(f"{client.http_url}/e").text == "f"
        client.shutdown()
    with serve.start(data_dir=tmp_path, http_options=NO_HTTP) as client:
        assert client.list_backends() == {}
        client.shutdown()


def test_an_embedded_server_that_dies_is_restarted_with_its_data(cluster: str, tmp_path: Path) -> None:
    with serve.start(data_dir=tmp_path, http_options=NO_HTTP) as client:
        client.create_backend("f", answering("f"), ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f")
        handle = client.get_handle("e")
        assert handle.remote().result(timeout=10) == "f"
        wait_until_written(client.redis_url)
        os.kill(server_pid(client.redis_url), signal.SIGKILL)
        assert handle.remote().result(timeout=20) == "f"
        client.create_backend("g", answering("g"), ray_actor_options=SMALL)
        client.shutdown()


def test_an_embedded_server_without_data_dir_gets_the_registry_back(cluster: str) -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("f", answering("f"), ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
        # When this returns, the controller has a backup of the endpoint as well.
        client.update_backend_config("f", {"max_queued_requests": 100})
        before = replicas(client)
        killed = server_pid(client.redis_url)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: server_pid(client.redis_url) not in (0, killed))
        # Until the registry is restored, there are no endpoints.
        wait_until(lambda: replicas(client) == before and _answers(client))
        wait_until(lambda: client.list_endpoints().keys() == {"e"})
        assert client.get_handle("e").remote().result(timeout=20) == "f"
        client.update_backend_config("f", {"num_replicas": 2})
        client.set_traffic("e", {"f": 1.0})


def _answers(client: serve.Client) -> bool:
    with HTTPClient() as http:
        return http.get(f"{client.http_url}/e").text == "f"


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"instance": "a b"}, ConfigError, "an instance 'a b' must be"),
        ({"instance": 3}, TypeError, "an instance must be a str, not int"),
        ({"redis_url": 3}, TypeError, "redis_url must be a str, not int"),
        ({"redis_url": "http://x"}, ConfigError, "is not a Redis URL"),
        ({"data_dir": 3}, TypeError, "data_dir must be a str or a Path, not int"),
        ({"redis_url": "redis://x", "data_dir": "x"}, ConfigError, "data_dir is for the embedded server"),
        ({"redis_url": "redis://x", "max_memory_bytes": 2**30}, ConfigError, "max_memory_bytes is for the embedded"),
        ({"max_memory_bytes": "1gb"}, TypeError, "max_memory_bytes must be an int, not str"),
        ({"max_memory_bytes": 1}, ConfigError, "max_memory_bytes must be at least 16777216 bytes, not 1"),
        ({"detached": True}, ConfigError, "a detached instance outlives this process"),
        ({"http_options": {"prot": 1}}, ConfigError, "HTTPOptions has no field 'prot'; did you mean 'port'?"),
        ({"http_options": 3}, TypeError, "http_options must be HTTPOptions, a dict of its fields or None, not int"),
        ({"http_options": {"port": "1"}}, TypeError, "HTTPOptions.port must be a valid integer, not str"),
    ],
)
def test_a_wrong_start_is_refused(cluster: str, arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        serve.start(**arguments)


def test_an_embedded_server_is_refused_on_several_nodes(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["penstock.serve.ray_nodes"], "alive_nodes", lambda: [1, 2])
    with pytest.raises(ConfigError, match="this Ray cluster has 2 nodes: give the redis_url of a server that all"):
        serve.start()
