"""The examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock import serve
from tests.support.ray_workers import forks_with_ray

EXAMPLES = Path(__file__).parents[2] / "examples"


def fixture_of_the_page() -> Any:
    """Return the fixture of docs/testing.md, for one test instead of a session."""
    page = (EXAMPLES.parent / "docs" / "testing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n([^`]*^@pytest\.fixture\(scope=[^`]*)^```", page, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code.replace('scope="session"', 'scope="function"'), "docs/testing.md", "exec"), names)
    return names["client"]


client_of_the_page = fixture_of_the_page()


def run(name: str, *arguments: str, cluster: str, folder: Path) -> str:
    """Run an example to its end, and return its output."""
    ran = subprocess.run(
        [forks_with_ray().python, EXAMPLES / name, *arguments],
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_ensemble_of_two_models_and_a_combiner(cluster: str, tmp_path: Path) -> None:
    printed = run("ensemble.py", cluster=cluster, folder=tmp_path)
    said = dict(line.strip().split(": accuracy ") for line in printed.splitlines())
    accuracy = {name: float(share) for name, share in said.items()}
    assert accuracy.keys() == {"linear", "forest", "ensemble"}
    assert min(accuracy.values()) > 0.9
    assert accuracy["ensemble"] >= max(accuracy["linear"], accuracy["forest"])


def test_a_csv_file_is_scored_while_the_web_is_served(cluster: str, tmp_path: Path) -> None:
    alone, meanwhile, csv = run("score_csv.py", "3000", cluster=cluster, folder=tmp_path).splitlines()
    for when, line in (("alone", alone), ("meanwhile", meanwhile)):
        assert re.fullmatch(rf"web {when} +\d+ requests, p50 +[\d.]+ ms, p99 +[\d.]+ ms", line)
    said = re.fullmatch(r"csv 3000 rows in [\d.]+ s \(\d+ rows/s\), accuracy ([\d.]+)", csv)
    assert said is not None
    assert float(said[1]) > 0.9


def test_a_slow_job_is_submitted_and_fetched_though_its_proxy_is_killed(cluster: str, tmp_path: Path) -> None:
    printed = run("transcribe.py", cluster=cluster, folder=tmp_path)
    assert printed.startswith("202: submitted\n")
    assert printed.count("the proxy is killed") == 1
    assert printed.endswith("200: water comes under pressure to the turbines and leaves them as light\n")


def test_the_first_example_of_the_readme_prints_what_stands_below_it(cluster: str, tmp_path: Path) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert found is not None
    script = tmp_path / "readme.py"
    script.write_text(found[1].replace("serve.start()", 'serve.start(http_options={"port": 0})'))
    ran = subprocess.run(
        [forks_with_ray().python, script],
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.stdout == found[2], ran.stderr


def test_the_fixture_of_the_page_on_testing_is_a_client(cluster: str, client_of_the_page: serve.Client) -> None:
    assert client_of_the_page.http_url is not None
    assert client_of_the_page.list_backends() == {}


def test_an_application_of_fastapi_validates_documents_and_streams(cluster: str, tmp_path: Path) -> None:
    assert run("api.py", cluster=cluster, folder=tmp_path).splitlines() == [
        "['water', 'and', 'turbine']",
        "Input should be a valid list",
        "['a', 'b']",
        "['/stem', '/spell/{word}']",
    ]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="PyTorch is not installed")
def test_images_are_classified_in_batches_on_the_gpu_or_the_processor(cluster: str, tmp_path: Path) -> None:
    rate, valid, invalid = run("images.py", "200", cluster=cluster, folder=tmp_path).splitlines()
    said = re.fullmatch(r"200 images on (cuda|cpu): \d+ images/s, largest batch (\d+)", rate)
    assert said is not None
    assert 1 < int(said[2]) <= 32
    assert re.fullmatch(rf'over HTTP: 200, {{"class":\d+,"device":"{said[1]}","batch":1}}', valid)
    assert invalid.startswith("over HTTP: 400, ")
    assert "not 12288 bytes of pixels" in invalid


def test_without_pytorch_the_example_for_gpus_names_what_to_install(tmp_path: Path) -> None:
    hidden = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", hidden, EXAMPLES / "images.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("this example needs PyTorch: pip install torch torchvision")
