"""The files around the code."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: there is no list of the files that belong here")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return [ROOT / name for name in listed.split("\0") if name]


def test_constraints_pin_versions_and_name_no_place_to_get_them_from() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pin = re.compile(r"[a-z0-9-]+==[0-9a-z.]+( ; [a-z_]+ [<>=!]+ '[^']+'( (and|or) [a-z_]+ [<>=!]+ '[^']+')*)?")
    assert [line for line in pins if not pin.fullmatch(line)] == []
    assert pins


def test_no_file_names_a_path_of_one_machine() -> None:
    place = re.compile(rb"(?<![\w.}/])/(?:work|root|home/\w+|Users/\w+)(?:/|\b)")
    found = [
        f"{file.relative_to(ROOT)}: {match.group().decode()}"
        for file in _tracked()
        if file.is_file() and not file.is_symlink() and file != Path(__file__)
        for match in place.finditer(file.read_bytes())
    ]
    assert found == []


def test_the_package_is_typed_once() -> None:
    assert [file.relative_to(ROOT) for file in _tracked() if file.name == "py.typed"] == [Path("py.typed")]


@pytest.mark.parametrize("folder", ["broker", "handles", "proxy", "runtime", "serve", "testing", "workers"])
def test_type_checkers_see_each_folder_as_a_subpackage(folder: str) -> None:
    link = ROOT / ".imports" / "penstock" / folder
    assert link.readlink() == Path("..", "..", folder)
    assert (link / "__init__.py").is_file()


def test_type_checkers_see_every_folder_that_is_installed() -> None:
    links = {entry.name for entry in os.scandir(ROOT / ".imports" / "penstock")}
    packages = {file.parent.name for file in ROOT.glob("[!.]*/__init__.py")}
    assert links == packages | {"__init__.py"}
