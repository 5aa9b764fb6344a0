"""``compose.yaml`` brought up under a name of its own, with its images, ports and network."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
_FILES = ("compose.yaml", "tests/containers/slow.yaml")
_COMMAND_S = 300.0


class Project:
    """The containers of one run.

    Args:
        name: begins the names of containers, networks, volumes and of the image that is built.
        environment: the variables of compose.yaml.
    """

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self._name = name
        self._environment = {**os.environ, **environment}

    def build(self) -> None:
        """Build the image of the Dockerfile."""
        self.compose("build", "--quiet", "head")

    def up(self, *, workers: int) -> None:
        """Bring up what is not up, with so many workers and no more, and wait until every service is healthy."""
        command = ("up", "--detach", "--wait", "--no-build", "--scale", f"worker={workers}")
        try:
            self.compose(*command)
        except AssertionError:
            # Ray ends a node whose agents take more than 15 s to start, as on a busy machine. Its container starts
            # again, and to Docker Compose one that ended is unhealthy.
            self.compose(*command)

    def workers(self) -> list[str]:
        """Return the names of the workers that run, in their order."""
        return sorted(self._names("worker"))

    def container(self, service: str) -> str:
        (name,) = self._names(service)
        return name

    def address(self, service: str, port: int) -> str:
        """Return host and port at which this machine reaches a published port."""
        return self.compose("port", service, str(port)).strip()

    def gateway(self) -> str:
        """Return the address at which the containers reach this machine."""
        return f"{self._environment['PENSTOCK_SUBNET']}.1"

    def ip(self, container: str) -> str:
        """Return the address at which this machine and the other containers reach a container."""
        (network,) = inspect(container)["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def wait_until_healthy(self, container: str) -> None:
        wait_until(lambda: inspect(container)["State"]["Health"]["Status"] == "healthy", timeout_s=_COMMAND_S)

    def logs(self) -> str:
        """Return the last lines of every container, and the states of all."""
        return self.compose("ps", "--all") + self.compose("logs", "--no-color", "--timestamps", "--tail=80")

    def take_down(self) -> None:
        """Remove the containers, and keep their volumes."""
        self.compose("down")

    def down(self) -> None:
        """Remove the containers, networks, volumes, and the image that was built."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout=0")
        if docker("images", "--quiet", image := self._environment["PENSTOCK_IMAGE"]):
            docker("rmi", image)

    def compose(self, *arguments: str) -> str:
        files = [f"--file={ROOT / file}" for file in _FILES]
        return _run("docker", "compose", f"--project-name={self._name}", *files, *arguments, env=self._environment)

    def _names(self, service: str) -> list[str]:
        listed = self.compose("ps", "--format={{.Name}}", service)
        return listed.split()


def docker(*arguments: str) -> str:
    return _run("docker", *arguments)


def inspect(container: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(docker("inspect", container))
    return found[0]


def logs(*containers: str) -> list[str]:
    """Return the lines of both outputs of containers."""
    return [line for container in containers for line in _run("docker", "logs", container, both=True).splitlines()]


def free_subnet() -> str:
    """Return the first three numbers of addresses (/24) that no network of this machine has."""
    taken = re.findall(r"inet (10\.213\.\d+)\.", _run("ip", "-4", "-oneline", "address"))
    start = os.getpid() % 250
    return next(subnet for n in range(250) if (subnet := f"10.213.{(start + n) % 250}") not in taken)


def _run(*command: str, env: Mapping[str, str] | None = None, both: bool = False) -> str:
    """Return what a command writes to stdout, or to ``both`` outputs."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_S, env=env)
    assert ran.returncode == 0, f"{' '.join(command[:8])} …: {ran.stderr or ran.stdout}"
    return ran.stdout + ran.stderr if both else ran.stdout
