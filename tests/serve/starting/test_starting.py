"""Checks before Ray is started, and a start that fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import serve
from penstock.handles.errors import BrokerUnavailable, ConfigError
from penstock.proxy.pages.admin_token import digest_of
from penstock.serve.ray_cluster import join_address
from penstock.serve.start_arguments import StartArguments
from penstock.testing import local
from tests.support.forks import shared_forks
from tests.support.frames import frames_below

START = """
import json, sys

from penstock import serve

try:
    serve.start(**json.loads(sys.argv[1]))
except Exception as e:
    print(type(e).__name__, e, sep=": ")

from penstock.runtime.processes import descendants

print("imported Ray:", "ray" in sys.modules)
print("left:", list(descendants().values()))
"""


def started(arguments: dict[str, Any], **environ: str) -> subprocess.CompletedProcess[str]:
    """Call ``serve.start`` in a process without Ray, and return its output."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PENSTOCK_REDIS_URL")}
    return subprocess.run(
        [shared_forks("penstock.serve.lifecycle").python, "-c", START, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**clean, **environ},
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"http_options": {"port": "80a"}}, "TypeError: HTTPOptions.port must be a valid integer, not str"),
        ({"http_option": {}}, "TypeError: start() got an unexpected keyword argument 'http_option'"),
        ({"redis_url": "localhost:6379"}, "ConfigError: 'localhost:6379' is not a Redis URL: "),
    ],
)
def test_a_wrong_argument_is_an_error_before_ray_is_imported(arguments: dict[str, Any], error: str) -> None:
    ran = started(arguments)
    assert ran.stdout.startswith(error)
    assert "imported Ray: False" in ran.stdout


def test_a_log_level_that_does_not_exist_is_an_error_before_ray_is_imported() -> None:
    ran = started({}, PENSTOCK_LOG_LEVEL="LOUD")
    assert "ConfigError: PENSTOCK_LOG_LEVEL must be one of DEBUG, INFO," in ran.stdout
    assert "imported Ray: False" in ran.stdout


def checked(**http_options: Any) -> StartArguments:
    return StartArguments.checked(
        redis_url=None,
        instance=None,
        detached=False,
        http_options=http_options,
        data_dir=None,
        max_memory_bytes=None,
        replica_redis_url=None,
        proxy_redis_url=None,
    )


def test_replicas_and_proxies_get_the_log_settings_of_the_process_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_LOG_FORMAT", "json")
    monkeypatch.delenv("PENSTOCK_LOG_LEVEL", raising=False)
    assert checked().environment == {"PENSTOCK_LOG_FORMAT": "json"}


def test_the_admin_token_of_the_environment_is_that_of_an_instance_with_a_dashboard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_ADMIN_TOKEN", "correct-horse-battery-staple")
    arguments = checked(admin_port=9000)
    assert arguments.plain_http["admin_token"] == digest_of("correct-horse-battery-staple")
    assert "correct-horse" not in repr(arguments)
    assert checked(admin_port=9000, admin_token="another-token-of-16").http.admin_token == digest_of(
        "another-token-of-16"
    )
    assert checked().http.admin_token is None
    monkeypatch.setenv("PENSTOCK_ADMIN_TOKEN", "short")
    with pytest.raises(ConfigError, match="it is that of PENSTOCK_ADMIN_TOKEN") as raised:
        checked(admin_port=9000)
    assert "short" not in str(raised.value)


def test_a_ray_cluster_that_cannot_be_reached_is_an_error_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=f"at {address} .RAY_ADDRESS. cannot be reached: Connection"):
            join_address(address)
    assert time.monotonic() - began_s < 10
    with pytest.raises(ConfigError, match="RAY_ADDRESS 'host:port' is not an address such as"):
        join_address("host:port")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"http_options": {"prot": 1}}, "HTTPOptions has no field 'prot'; did you mean 'port'?"),
        ({"http_options": {"port": 70000}}, "HTTPOptions.port must be less than or equal to 65535, not 70000"),
        ({"detached": 1}, "detached must be a bool, not int"),
        ({"redis_url": "http://localhost"}, "'http://localhost' is not a Redis URL"),
    ],
)
def test_the_error_of_a_wrong_start_shows_the_users_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, TypeError)) as raised:
        serve.start(**arguments)
    assert says in str(raised.value)
    assert frames_below(__file__, raised.value) <= 2


def test_a_mistake_in_the_arguments_of_a_local_backend_shows_the_users_line() -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_replicas'") as raised:
        local(len, config={"replicas": 4})
    assert frames_below(__file__, raised.value) <= 2


def test_a_broker_that_refuses_connections_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        port = closed.getsockname()[1]
        for url in (f"redis://:secret@127.0.0.1:{port}", f"unix://{tmp_path}/nothing.sock", "redis://no.such.invalid"):
            began_s = time.monotonic()
            with pytest.raises(BrokerUnavailable) as raised:
                serve.start(redis_url=url)
            assert time.monotonic() - began_s < 4, "it was tried again and again"
            assert "secret" not in str(raised.value)


def test_a_broker_that_cannot_be_reached_is_an_error_before_ray_is_imported(tmp_path: Path) -> None:
    ran = started({"redis_url": f"unix://{tmp_path}/nothing.sock"})
    assert ran.stdout.startswith("BrokerUnavailable: ")
    assert "imported Ray: False" in ran.stdout


def test_a_port_in_use_is_an_error_before_ray_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = started({"http_options": {"port": port}})
    assert ran.stdout.startswith(f"ConfigError: cannot serve HTTP on 127.0.0.1:{port}: the port is in use")
    assert "imported Ray: False" in ran.stdout


@pytest.mark.parametrize(
    ("host", "message"),
    [("203.0.113.7", "'203.0.113.7' is not an address of this machine"), ("no.such.invalid", "cannot be resolved")],
)
def test_a_host_that_is_not_of_this_machine_is_an_error_before_ray_is_imported(host: str, message: str) -> None:
    ran = started({"http_options": {"host": host, "port": 0}})
    assert ran.stdout.startswith("ConfigError: ")
    assert message in ran.stdout
    assert "imported Ray: False" in ran.stdout


def test_a_port_in_use_leaves_no_key(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = started({"redis_url": redis_url, "http_options": {"port": other.getsockname()[1]}})
    assert "the port is in use" in ran.stdout
    # The next start does not wait for an owner that has given up.
    with pytest.raises(ConfigError, match="there is no instance"):
        serve.connect(redis_url)


def test_a_ray_that_cannot_start_is_an_error_with_its_logs_and_leaves_no_process(tmp_path: Path) -> None:
    """An object store below Ray's minimum is refused after the first processes were started."""
    ran = started(
        {"http_options": {"location": None}},
        RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION="0.000001",
        RAY_TMPDIR=str(tmp_path),
    )
    assert ran.stderr.startswith("penstock: starting Ray on this machine\n")
    assert ran.stdout.startswith("PenstockError: Ray cannot be started on this machine: ")
    assert f"its logs are in {tmp_path}/ray/session_" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "left: []"
