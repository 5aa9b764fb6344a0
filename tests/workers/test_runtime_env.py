import os
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from penstock.broker.errors import ConfigError
from penstock.workers import runtime_env
from penstock.workers.runtime_env import UnpackedRuntimeEnv, for_ray, pack

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / "code" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "code"

    return write


def names(archive: bytes) -> list[str]:
    with ZipFile(BytesIO(archive)) as members:
        return [name for name in members.namelist() if not name.endswith("/")]


def test_the_same_files_give_the_same_bytes(write: Write) -> None:
    env = {"working_dir": str(write(a_py="1", sub__b_py="2"))}
    first = pack(env, "v1")
    os.utime(Path(env["working_dir"]) / "a.py", (1, 1))
    assert pack(env, "v1") == first
    assert pack(env, "v2") != first
    write(a_py="3")
    assert pack(env, "v1") != first


def test_excluded_and_ignored_files_are_not_packed(write: Write) -> None:
    code = write(a_py="", a_bin="", data__b_py="", sub__c_py="", sub__c_txt="", sub__logs__d_py="", __git__head="")
    (code / "sub" / ".gitignore").write_text("*.txt\n")
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "a.pyc").write_text("")
    (code / ".git").mkdir()
    (code / ".git" / "HEAD").write_text("")
    packed = pack({"working_dir": str(code), "excludes": ["*.bin", "/data", "logs/"]}, "")
    assert names(packed) == ["working_dir/a.py", "working_dir/sub/.gitignore", "working_dir/sub/c.py"]


def test_remote_directories_are_left_to_ray(write: Write) -> None:
    code, remote = str(write(a_py="")), "https://example.com/code.zip"
    env: dict[str, Any] = {"working_dir": remote, "py_modules": [code, remote], "pip": ["x"], "excludes": ["*.bin"]}
    assert for_ray(env) == {"working_dir": remote, "py_modules": [remote], "pip": ["x"]}
    assert for_ray({"working_dir": code, "py_modules": [code]}) == {}
    assert names(pack(env, "")) == ["py_modules/0/code/a.py"]
    assert pack(for_ray(env), "") == b""


def test_a_directory_that_cannot_be_packed_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    code = write(a_py="x" * 3 * 2**20, b_py="")
    with pytest.raises(ConfigError, match="there is no directory '/nowhere'"):
        pack({"py_modules": ["/nowhere"]}, "")
    with pytest.raises(ConfigError, match=r"there is no directory '.*a\.py'"):
        pack({"working_dir": str(code / "a.py")}, "")
    monkeypatch.setattr(runtime_env, "MAX_BYTES", 2**21)
    with pytest.raises(ConfigError, match=r"'.*/code' have 3\.0 MiB in 2 files, and at most 2 MiB are allowed"):
        pack({"working_dir": str(code)}, "")
    (code / "loop").symlink_to(code)
    with pytest.raises(ConfigError, match="leads to a directory that contains it"):
        pack({"working_dir": str(code)}, "")


def test_unpacked_directories_exist_until_they_are_removed(write: Write) -> None:
    code = write(penstock1_py="VALUE = 1", run_sh="")
    (code / "run.sh").chmod(0o700)
    (code / "empty").mkdir()
    before = os.getcwd(), list(sys.path)
    unpacked = UnpackedRuntimeEnv(pack({"working_dir": str(code), "py_modules": [str(code)]}, ""))
    unpacked.enter()
    try:
        here = Path.cwd()
        assert sys.path[0] == str(here)
        assert (Path(sys.path[1]) / "code" / "penstock1.py").read_text() == "VALUE = 1"
        assert sorted(path.name for path in here.iterdir()) == ["empty", "penstock1.py", "run.sh"]
        assert os.access("run.sh", os.X_OK)
        assert not os.access("penstock1.py", os.X_OK)
    finally:
        unpacked.remove()
    assert (os.getcwd(), sys.path) == before
    assert not here.parent.exists()


def test_directories_of_a_killed_replica_are_removed_by_the_next(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary" / "penstock-code-dead" / "working_dir").mkdir(parents=True)
    packed = pack({"working_dir": str(write(a_py=""))}, "")
    first, second = UnpackedRuntimeEnv(packed), UnpackedRuntimeEnv(packed)
    assert len(list((tmp_path / "temporary").iterdir())) == 2
    first.remove()
    second.remove()
    assert not list((tmp_path / "temporary").iterdir())
