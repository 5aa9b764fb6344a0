"""A base image for the Dockerfile, made of this machine's Python and packages: for engines that reach no registry.

It stands for an image such as ``python:3.12-slim``. What Penstock requires is installed in it already, so that its pip
needs no network and unpacks next to nothing.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.containers.project import docker
from tests.support.brokers import images

_WHEELS = "/wheels"
_LABEL = "penstock.test"
"""What is built on the image has its label."""
_SHELL = ("sh", "bash", "ls")
_SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "jars", "rllib"}
"""Names of folders that no process of the cluster reads, and of those that are added by distributions."""
_BUILD = "setuptools>=77"
"""What builds Penstock's wheel: pyproject.toml's ``build-system``."""


@contextmanager
def python_image(name: str, packages: Iterable[str]) -> Generator[dict[str, str]]:
    """Yield the variables of compose.yaml for a build: with a base image of this machine, if no other can be had.

    That image has ``packages``, which are requirements that are installed here. It is removed in the end, and with it
    what was built on it and has no name any more.
    """
    if image := images()["python"]:
        yield {"PYTHON_IMAGE": image}
        return
    base = f"{name}-python"
    _make(base, packages)
    try:
        # The engine's own builder finds an image that no registry has, and needs no plugin.
        yield {"PYTHON_IMAGE": base, "DOCKER_BUILDKIT": "0"}
    finally:
        docker("rmi", base)
        docker("image", "prune", "--force", f"--filter=label={_LABEL}={base}")


def _make(name: str, packages: Iterable[str]) -> None:
    python, standard = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    environment = {
        "PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": _WHEELS,
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # Debian's Python refuses otherwise
    }
    variables = (f"ENV {variable}={value}" for variable, value in environment.items())
    with _imported(name, [f"LABEL {_LABEL}={name}", *variables]) as image:
        for program in _SHELL:
            image.add_file(Path(shutil.which(program) or program), Path("/bin", program))
        image.add_file(python, python)
        for alias in ("python", "python3"):
            image.add_link(Path("/usr/local/bin", alias), python)
        image.add_standard_library(standard)
        for installed in ("pip", *_required(packages) - {"penstock"}):
            image.add_distribution(installed, standard / "site-packages")
        image.add_libraries()
        image.add_text("/etc/passwd", "root:x:0:0::/:/bin/sh\n")
        image.add_text("/etc/group", "root:x:0:\n")
        image.add_text("/etc/nsswitch.conf", "hosts: files dns\n")
        image.add_folder("/tmp", 0o1777)
        with tempfile.TemporaryDirectory() as downloaded:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={downloaded}", _BUILD]
            subprocess.run(pip, capture_output=True, check=True)
            for wheel in Path(downloaded).iterdir():
                image.add_file(wheel, Path(_WHEELS, wheel.name))


@contextmanager
def _imported(name: str, changes: Iterable[str]) -> Generator[_Files]:
    """Import into the engine the files that the block adds, with ``changes``, which are a Dockerfile's instructions."""
    command = ["docker", "import", *(f"--change={change}" for change in changes), "-", name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as importing:
        assert importing.stdin is not None
        assert importing.stderr is not None
        try:
            # Read and sent at once: nothing is copied on this machine, or packed.
            with tarfile.open(
                fileobj=importing.stdin, mode="w|", format=tarfile.GNU_FORMAT, dereference=True, bufsize=1 << 20
            ) as archive:
                yield _Files(archive)
        except BaseException:
            importing.kill()  # it would import what there is
            raise
        importing.stdin.close()
        failed = importing.stderr.read().decode()
        assert importing.wait() == 0, failed


class _Files:
    """The files of an image, each of which is added once."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._added = set[Path]()
        self._binaries = list[str]()

    def add_text(self, inside: str, text: str) -> None:
        member = tarfile.TarInfo(inside.lstrip("/"))
        member.size = len(content := text.encode())
        self._archive.addfile(member, io.BytesIO(content))

    def add_folder(self, inside: str, mode: int) -> None:
        member = tarfile.TarInfo(inside.lstrip("/"))
        member.type, member.mode = tarfile.DIRTYPE, mode
        self._archive.addfile(member)

    def add_link(self, inside: Path, target: Path) -> None:
        member = tarfile.TarInfo(str(inside).lstrip("/"))
        member.type, member.linkname = tarfile.SYMTYPE, str(target)
        self._archive.addfile(member)

    def add_file(self, source: Path, inside: Path) -> None:
        if inside in self._added:
            return
        self._added.add(inside)
        member = self._archive.gettarinfo(source, str(inside))
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        if ".so" in source.suffixes or member.mode & 0o111:
            self._binaries.append(str(source))
        with source.open("rb") as file:
            self._archive.addfile(member, file)

    def add_libraries(self) -> None:
        """Add what the programs and extension modules so far are linked to, except what packages bring along."""
        linked = subprocess.run(["ldd", *self._binaries], capture_output=True, text=True, check=False).stdout
        for library in set(re.findall(r"(/\S+) \(0x", linked)):
            if not library.startswith(sys.prefix):
                self.add_file(Path(library), Path(library))

    def add_standard_library(self, folder: Path) -> None:
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith("config-")]
            for name in files:
                if not name.endswith(".a"):
                    self.add_file(Path(place, name), Path(place, name))

    def add_distribution(self, name: str, folder: Path) -> None:
        """Add what is installed here under that name to ``folder``; not its scripts, which name this environment."""
        for file in distribution(name).files or ():
            source = Path(str(file.locate()))
            if ".." not in file.parts and _SKIPPED.isdisjoint(file.parts) and source.exists():
                self.add_file(source, folder / file)


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
