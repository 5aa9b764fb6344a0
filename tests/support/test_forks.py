"""Forks that run Python scripts in place of a new Python."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.forks import ForkServer
from tests.support.ray_workers import IMPORTS

RANDOM = """
import threading, ray

ids = [ray.NodeID.from_random().hex()]
threads = [threading.Thread(target=lambda: ids.append(ray.NodeID.from_random().hex())) for _ in range(3)]
for thread in threads:
    thread.start()
    thread.join()
print(*ids)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    forks = ForkServer(tmp_path_factory.mktemp("forks"), ["json", *IMPORTS], scripts=("-c",))
    yield forks
    forks.close()


def python(forks: ForkServer, code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(forks.python), "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def test_a_fork_has_the_arguments_environment_directory_and_files_of_its_start(
    forks: ForkServer, tmp_path: Path
) -> None:
    code = (
        "import os, sys; print(sys.argv[1:], os.environ['FOUR'], 'HOME' in os.environ, os.getcwd(), sys.stdin.read())"
    )
    ran = python(forks, code, "one", "two", input="three", cwd=tmp_path, env={"FOUR": "4"})
    assert ran.stdout == f"['one', 'two'] 4 False {tmp_path} three\n"


def test_forks_are_made_whatever_the_folder_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "forks").mkdir()
    forks = ForkServer(folder, ["json"], scripts=("-c",))
    try:
        assert python(forks, "import os; print(os.getcwd())").stdout == f"{tmp_path}\n"
    finally:
        forks.close()


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 15)"])
def test_a_fork_ends_with_its_own_code_or_signal(forks: ForkServer, code: str) -> None:
    assert python(forks, code).returncode == (3 if "Exit" in code else -15)


def test_a_fork_gets_the_signals_of_its_launcher_and_ends_with_it(forks: ForkServer) -> None:
    code = """
import os, signal, time

signal.signal(signal.SIGTERM, lambda *_: print("terminated", flush=True))
print(os.getpid(), flush=True)
while True:
    time.sleep(1)
"""
    with subprocess.Popen([str(forks.python), "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        output: IO[str] | None = launcher.stdout
        assert output is not None
        assert Path(f"/proc/{output.readline().strip()}").exists()
        launcher.terminate()
        assert output.readline() == "terminated\n"
        launcher.kill()
        assert output.read() == ""  # the fork had it open too


def test_forks_have_different_random_ids_of_ray(forks: ForkServer) -> None:
    """Also on their threads: two actors of one id would be one to Ray."""
    ids = [id_ for _ in range(2) for id_ in python(forks, RANDOM, env=dict(os.environ)).stdout.split()]
    assert len(set(ids)) == len(ids) == 8


def test_a_launcher_that_is_killed_before_it_was_understood_harms_no_other_one(
    forks: ForkServer, tmp_path: Path
) -> None:
    path = str(forks.python.with_name("forks"))
    for sent in (b"", b"\0\0", (1000).to_bytes(4, "big")):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.send(sent)
    assert python(forks, "print(1)").stdout == "1\n"


def test_what_is_not_to_be_forked_runs_in_python(forks: ForkServer) -> None:
    ran = subprocess.run([str(forks.python), "-V"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("Python ")


def test_a_fork_is_in_the_network_of_its_launcher(forks: ForkServer) -> None:
    def network(*launch: str) -> str:
        code = "import os; print(os.readlink('/proc/self/ns/net'))"
        command = [*launch, str(forks.python), "-c", code]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return ran.stdout.strip() if ran.returncode == 0 else pytest.skip(f"networks cannot be made: {ran.stderr}")

    own = network()
    assert own == os.readlink("/proc/self/ns/net")
    other = network("unshare", "--net")
    assert other.startswith("net:[")
    assert other != own
