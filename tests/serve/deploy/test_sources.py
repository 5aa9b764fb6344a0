"""Comparison of a deployment with local code: the source of an import path, the directories of a runtime_env."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.broker.registry.records import BackendRecord
from penstock.serve.deploy.sources import find_source, local_code, source_digest
from penstock.workers.runtime_env import pack
from tests.serve.deploy.manifests import backend_record


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package ``penstock_models`` in a working directory. It cannot be imported."""
    package = tmp_path / "penstock_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "digits.py").write_text("raise RuntimeError('imported')\n")
    return package


def record(tag: str, target: str, environment: dict[str, object]) -> BackendRecord:
    """Return the record of a backend that is deployed now."""
    packed = pack(environment, "1")
    files = hashlib.sha256(packed).hexdigest() if packed else ""
    return replace(backend_record(tag), source=source_digest(target, environment), files=files)


TARGET = "penstock_models.digits:Digits"


def test_an_edited_module_is_a_change_and_an_unchanged_one_is_not(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package.parent)
    deployed = record("digits", TARGET, {})
    assert local_code(TARGET, None, deployed).changes(deployed) == []
    (package / "digits.py").write_text("NEW = 1\n")
    code = local_code(TARGET, None, deployed)
    assert code.changes(deployed) == ["source of penstock_models.digits"]
    assert code.compared(deployed) == f"the declaration, the source of penstock_models.digits ({package})"
    assert "penstock_models" not in sys.modules


def test_an_edited_neighbour_in_the_package_is_a_change(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(package.parent)
    deployed = record("digits", TARGET, {})
    (package / "helpers.py").write_text("")
    assert local_code(TARGET, None, deployed).changes(deployed) == ["source of penstock_models.digits"]


def test_a_module_below_directories_without_init_files_is_compared_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "penstock_site" / "models").mkdir(parents=True)
    module = tmp_path / "penstock_site" / "models" / "digits.py"
    module.write_text("OLD = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    target = "penstock_site.models.digits:Digits"
    deployed = record("digits", target, {})
    assert deployed.source
    (module.parent / "neighbour.py").write_text("")
    assert local_code(target, None, deployed).changes(deployed) == []
    module.write_text("NEW = 1\n")
    assert local_code(target, None, deployed).changes(deployed) == ["source of penstock_site.models.digits"]
    assert find_source("penstock_site.models:Digits", None) is None


def test_a_changed_file_of_the_working_dir_is_a_change(package: Path) -> None:
    environment: dict[str, object] = {"working_dir": str(package.parent)}
    deployed = record("digits", TARGET, environment)
    assert local_code(TARGET, environment, deployed).changes(deployed) == []
    (package.parent / "weights.bin").write_bytes(b"\1")
    code = local_code(TARGET, environment, deployed)
    assert code.changes(deployed) == ["files of working_dir"]
    assert "the files of working_dir" in code.compared(deployed)


def test_a_module_that_is_not_here_is_not_compared_and_the_way_out_is_named() -> None:
    deployed = record("digits", "penstock_elsewhere:Digits", {})
    code = local_code("penstock_elsewhere:Digits", None, deployed)
    assert code.changes(deployed) == []
    assert code.compared(deployed) == (
        "the declaration; module 'penstock_elsewhere' is not found here, so its source was not compared: "
        "--restart digits replaces the replicas"
    )


def test_a_source_that_was_not_known_at_deployment_is_not_a_change() -> None:
    deployed = replace(record("digits", "json:loads", {}), source="")
    code = local_code("json:loads", None, deployed)
    assert code.changes(deployed) == []
    assert "the source of json was not known where it was deployed" in code.compared(deployed)


def test_a_single_module_is_its_file_and_a_builtin_has_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "penstock_single.py").write_text("A = 1\n")
    monkeypatch.chdir(tmp_path)
    source = find_source("penstock_single:A", None)
    assert source is not None
    assert source.path == tmp_path / "penstock_single.py"
    assert find_source("penstock_single.inner:A", None) is None
    assert find_source("sys:exit", None) is None
    assert source_digest(print, None) == ""
