"""A base image for the Dockerfile, made of this machine's Python and of wheels: for engines that reach no registry.

It stands for an image such as ``python:3.12-slim``. Its pip installs from the image's own folder of wheels, without a
network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.brokers import images
from tests.containers.project import docker

_WHEELS = "/wheels"
_LABEL = "penstock.test"
"""What is built on the image has its label."""
_SHELL = ("sh", "bash", "ls")
_SKIPPED = shutil.ignore_patterns("test", "tests", "idlelib", "site-packages", "dist-packages", "config-*", "*.a")
_BUILD = "setuptools>=77"
"""What builds Penstock's wheel: pyproject.toml's ``build-system``."""


@contextmanager
def python_image(name: str, folder: Path, packages: Iterable[str]) -> Generator[dict[str, str]]:
    """Yield the variables of compose.yaml for a build: with a base image of this machine, if no other can be had.

    That image can install ``packages``, which are requirements that are installed here. It is removed in the end, and
    with it what was built on it and has no name any more.
    """
    if image := images()["python"]:
        yield {"PYTHON_IMAGE": image}
        return
    base = f"{name}-python"
    _make(base, folder, packages)
    try:
        # The engine's own builder finds an image that no registry has, and needs no plugin.
        yield {"PYTHON_IMAGE": base, "DOCKER_BUILDKIT": "0"}
    finally:
        docker("rmi", base)
        docker("image", "prune", "--force", f"--filter=label={_LABEL}={base}")


def _make(name: str, folder: Path, packages: Iterable[str]) -> None:
    python, packages_folder = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"), "site-packages")
    image = _Files(folder)
    for program in _SHELL:
        image.add_program(Path(shutil.which(program) or program), Path("/bin", program))
    image.add_program(python, python)
    for alias in ("python", "python3"):
        image.add_link(Path("/usr/local/bin", alias), python)
    image.add_folder(Path(sysconfig.get_path("stdlib")))
    for file in distribution("pip").files or ():
        if ".." not in file.parts:
            image.add_file(Path(str(file.locate())), packages_folder / file)
    image.add_text("/etc/passwd", "root:x:0:0::/:/bin/sh\n")
    image.add_text("/etc/group", "root:x:0:\n")
    image.add_text("/etc/nsswitch.conf", "hosts: files dns\n")
    image.add_libraries(_binaries())
    _download(image.path(_WHEELS), packages)
    environment = {
        "PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": _WHEELS,
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # Debian's Python refuses otherwise
    }
    image.make(
        name, [f"LABEL {_LABEL}={name}", *(f"ENV {variable}={value}" for variable, value in environment.items())]
    )


class _Files:
    """The files of an image, in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path("/tmp").mkdir(parents=True)
        self.path("/tmp").chmod(0o1777)

    def path(self, inside: str | Path) -> Path:
        """Return where a file of the image is on this machine."""
        return self._root / str(inside).lstrip("/")

    def add_text(self, inside: str, text: str) -> None:
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text)

    def add_link(self, inside: Path, target: Path) -> None:
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).symlink_to(target)

    def add_folder(self, folder: Path) -> None:
        shutil.copytree(folder, self.path(folder), ignore=_SKIPPED, dirs_exist_ok=True)

    def add_file(self, source: Path, inside: Path) -> None:
        target = self.path(inside)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)

    def add_program(self, program: Path, inside: Path) -> None:
        """Add a program with the libraries that it is linked to."""
        self.add_file(program, inside)
        self.add_libraries([program])

    def add_libraries(self, binaries: Iterable[Path]) -> None:
        """Add what ``binaries`` are linked to, except what wheels bring along."""
        linked = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
        for library in set(re.findall(r"(/\S+) \(0x", linked)):
            if not library.startswith(sys.prefix):
                self.add_file(Path(library), Path(library))

    def make(self, name: str, changes: Iterable[str]) -> None:
        """Import the files into the engine, with instructions as in a Dockerfile."""
        command = ["docker", "import", *(f"--change={change}" for change in changes), "-", name]
        packed = ["tar", "--directory", str(self._root), "--owner=0", "--group=0", "--create", "."]
        with subprocess.Popen(packed, stdout=subprocess.PIPE) as packing:
            subprocess.run(command, stdin=packing.stdout, capture_output=True, check=True)


def _binaries() -> list[Path]:
    """Return the programs and extension modules that an image's Python will load."""
    ours, standard = Path(sysconfig.get_path("platlib")), Path(sysconfig.get_path("stdlib"))
    return [
        *standard.glob("lib-dynload/*.so"),
        *ours.glob("**/*.so"),
        *(file for file in ours.glob("ray/core/src/ray/*/*") if os.access(file, os.X_OK) and file.is_file()),
    ]


def _download(folder: Path, packages: Iterable[str]) -> None:
    """Download the wheels of ``packages`` and of what they require, in the versions that are installed here."""
    pins = [f"{name}=={distribution(name).version}" for name in _required(packages) if name != "penstock"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    ran = subprocess.run([*command, f"--dest={folder}", *pins, _BUILD], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def _required(packages: Iterable[str]) -> set[str]:
    """Return the names of the distributions that ``packages`` require on this machine, themselves included."""
    extras_of, queue = dict[str, set[str]](), [Requirement(package) for package in packages]
    while queue:
        requirement = queue.pop()
        name, extras = requirement.name.lower(), {"", *requirement.extras}
        if extras <= extras_of.get(name, set()):
            continue
        extras_of[name] = extras_of.get(name, set()) | extras
        required = [Requirement(text) for text in distribution(name).requires or ()]
        queue += [
            one for one in required if one.marker is None or any(one.marker.evaluate({"extra": x}) for x in extras)
        ]
    return set(extras_of)
