"""The documents beside the code."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_FOLDERS = "broker|handles|proxy|workers|serve|testing|runtime|tests|benchmarks|examples|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"`((?:{_FOLDERS})/[\w./-]+\.(?:py|md))`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_folder_is_a_table_of_contents() -> None:
    """At most 14 modules in a folder, so that it can be read at a glance."""
    paths = [file.relative_to(ROOT) for name in _FOLDERS.split("|") for file in (ROOT / name).rglob("*.py")]
    counts = Counter(
        path.parent.as_posix()
        for path in paths
        if path.name != "__init__.py" and not any(part.startswith(".") for part in path.parts)
    )
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_every_constant_of_the_tuning_page_is_where_it_says() -> None:
    rows = re.findall(
        r"^\| (`[A-Z_`, ]+) \| [^|]+ \| `([\w/.]+)` \|", (ROOT / "docs/tuning.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 10
    for names, file in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"[A-Z_]+", names):
            assert re.search(rf"^{name}\b.* = ", text, re.MULTILINE), f"{file} has no {name}"


def test_every_constant_with_a_unit_is_on_the_tuning_page() -> None:
    """A public constant is named in other modules or by its page, so an operator may meet it."""
    page = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[A-Z][A-Z_]+", page))
    files = [file for name in _FOLDERS.split("|")[:7] for file in (ROOT / name).rglob("*.py")]
    found = [
        (str(file.relative_to(ROOT)), constant)
        for file in files
        for constant in re.findall(
            r"(?m)^([A-Z][A-Z_]*_(?:S|MS|BYTES|CHARS|ROWS))\b[^=\n]* = ", file.read_text("utf-8")
        )
    ]
    assert len(found) > 40
    not_bounds = [(file, constant) for file, constant in found if not constant.endswith("BOUNDS_S")]  # of histograms
    assert [(file, constant) for file, constant in not_bounds if constant not in named] == []
