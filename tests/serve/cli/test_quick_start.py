"""The commands of docs/quickstart.md print what the page says."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.handles.site import Site
from tests.serve.cli.conftest import Penstock

PAGE = (Path(__file__).parents[3] / "docs" / "quickstart.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def sentiment(site: Site) -> Any:
    """The backend of the page, which a replica serves."""
    names: dict[str, Any] = {"__name__": "app"}
    exec(compile(BLOCKS[0], "app.py", "exec"), names)
    site.serve(names["Sentiment"]({"good": 1, "bad": -1}).__call__, "sentiment")
    return names["Sentiment"]


def test_the_commands_of_the_page(sentiment: Any, penstock: Penstock) -> None:
    shown = re.findall(r"^(penstock call .*|printf .*)\n((?:\{.*\n)+)", PAGE, re.MULTILINE)
    assert len(shown) == 2
    for line, output in shown:
        before, _, command = line.rpartition("| penstock" if "|" in line else "penstock")
        stdin = subprocess.check_output(["sh", "-c", before], text=True) if before else ""
        ran = penstock(*shlex.split(command), stdin=stdin)
        assert sorted(ran.out.splitlines()) == sorted(output.splitlines()), ran.err


def test_the_python_of_the_page(
    sentiment: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    exec(compile(BLOCKS[1], "docs/quickstart.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "{'score': 1}"
    assert second.endswith(" {'score': -1}")


def test_the_test_of_the_page(sentiment: Any) -> None:
    names: dict[str, Any] = {"Sentiment": sentiment}
    exec(compile(BLOCKS[2].replace("from app import Sentiment\n", ""), "docs/quickstart.md", "exec"), names)
    names["test_a_good_day_scores"]()
