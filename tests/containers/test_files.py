"""The files of the cluster in containers, without the cluster."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from penstock.broker.registry.records import Snapshot
from penstock.serve.deploy.manifest import read
from tests.clients.proxies import program
from tests.containers.project import ROOT, Project

FOLDER = ROOT / "examples/compose"


def services() -> dict[str, dict[str, Any]]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    found: dict[str, dict[str, Any]] = content["services"]
    return found


def test_docker_compose_accepts_the_file(docker_compose: None) -> None:
    assert Project("penstock-test", {}).compose("config", "--services").split() != []


@pytest.mark.parametrize("name", services())
def test_every_container_is_without_privileges(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # The Dockerfile's image has a user of its own.
    assert "build" in service or service["user"].partition(":")[0] not in ("0", "root")


@pytest.mark.parametrize("name", sorted(services().keys() - {"deploy"}))
def test_every_lasting_service_has_a_health_check_and_is_restarted(name: str) -> None:
    service = services()[name]
    assert service["healthcheck"]["test"]
    assert service["restart"] == "unless-stopped"


def test_the_worker_is_killed_only_after_its_drain() -> None:
    grace_s = int(services()["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > 60  # --drain-timeout


def test_haproxy_accepts_the_balancers_configuration() -> None:
    command = [program("haproxy", "haproxy"), "-c", "-f", str(FOLDER / "haproxy.cfg")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert "WARNING" not in checked.stderr


def test_the_deployed_file_has_no_mistake() -> None:
    manifest, mistakes = read((FOLDER / "digits.yaml").read_text(), Snapshot())
    assert mistakes == []
    assert list(manifest.backends) == ["digits"]
