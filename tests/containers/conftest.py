from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from penstock import serve
from tests.containers.project import Project, free_subnet
from tests.containers.python_image import python_image
from tests.support.brokers import images, no_docker
from tests.support.guarded import free_port

PASSWORD = "of-the-test"
_PACKAGES = ("penstock[serve]", "scikit-learn", "httpx")
"""What the Dockerfile installs for compose.yaml."""


@pytest.fixture(scope="session")
def docker_compose() -> None:
    """An engine, and ``docker compose``. Without them the test is skipped; in CI (``CI=true``) that is a failure."""
    reason = no_docker()
    if not reason:
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
        reason = f"no `docker compose`: {asked.stderr.strip()}" if asked.returncode else None
    if reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def project(request: pytest.FixtureRequest, docker_compose: None) -> Iterator[Project]:
    """compose.yaml with one worker, up and healthy, whose image was built of this tree."""
    if sys.platform != "linux":
        pytest.skip("elsewhere than on Linux this machine has no address in the containers' network")
    name = f"penstock-test-{os.getpid()}"
    environment = {
        "PENSTOCK_IMAGE": name,
        "PENSTOCK_REDIS_IMAGE": images()["valkey"],
        "PENSTOCK_LB_IMAGE": images()["haproxy"],
        "PENSTOCK_REDIS_PASSWORD": PASSWORD,
        # Not 0: a container that is started again would get other ports.
        "PENSTOCK_REDIS_PORT": str(free_port()),
        "PENSTOCK_HTTP_PORT": str(free_port()),
        "PENSTOCK_SUBNET": free_subnet(),
    }
    with python_image(name, _PACKAGES) as python:
        project = Project(name, {**environment, **python})
        failed_before, is_up = request.session.testsfailed, False
        try:
            project.build()
            project.up(workers=1)
            is_up = True
            yield project
        finally:
            if not is_up or request.session.testsfailed > failed_before:
                print(project.logs())
            project.down()


@pytest.fixture(scope="module")
def client(project: Project) -> Iterator[serve.Client]:
    with serve.connect(f"redis://:{PASSWORD}@{project.address('redis', 6379)}") as client:
        yield client
