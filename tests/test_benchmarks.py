"""The benchmarks start: each program finds what it imports."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from benchmarks.harness.cases import CASES
from benchmarks.harness.catalogue import SYSTEMS
from benchmarks.harness.measure import serving
from benchmarks.harness.measurements.scaling import Cost, Layout, stages_at
from tests.support.ray_workers import forks_with_ray

FOLDER = Path(__file__).parent.parent / "benchmarks"
# Those of peers need the peers' environment, and the one that measures the start-up runs only below the harness.
PROGRAMS = [
    FOLDER / "run.py",
    FOLDER / "gpu.py",
    *sorted({*(FOLDER / "systems").glob("*/penstock_*.py")} - {FOLDER / "systems" / "startup" / "penstock_startup.py"}),
    FOLDER / "systems" / "http" / "path_server.py",
    FOLDER / "systems" / "images" / "direct_images.py",
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_finds_what_it_imports(program: Path) -> None:
    command = [str(forks_with_ray().python), str(program), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "usage: " in ran.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="benchmarks need Linux: its subreapers and /proc")
@pytest.mark.parametrize("name", CASES["bare"].systems)
def test_the_path_without_ray_serves_with_the_defaults_and_without(name: str) -> None:
    with serving(SYSTEMS[name], [CASES["bare"]]) as served:  # which compares an answer, before and after
        assert served.ready_s > 0


def test_the_picture_shows_the_figures_of_the_page_on_performance() -> None:
    docs = FOLDER.parent / "docs"
    points = json.loads((docs / "images" / "latency.json").read_text())["cases"]["open-noop"]
    rows = re.findall(
        r"^\| (.+?) \| ([\d.| ,]+)\|$", _section(docs / "performance.md", "Latency at a given rate"), re.M
    )
    stated = {
        title: [float(cell.replace(",", "")) for cell in cells.split("|") if cell.strip()] for title, cells in rows
    }
    rounds: dict[str, dict[int, list[float]]] = {}
    for point in points:
        rounds.setdefault(_TITLES[point["system"]], {}).setdefault(point["rate_per_s"], []).append(point["p99_ms"])
    drawn = {title: [median(rates[rate]) for rate in sorted(rates)] for title, rates in rounds.items()}
    assert drawn.keys() == stated.keys()
    for title, figures in drawn.items():
        assert figures == pytest.approx(stated[title], rel=0.006), title  # stated with three digits


def test_a_result_is_drawn_with_a_line_for_each_system(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result, picture = FOLDER.parent / "docs" / "images" / "latency.json", tmp_path / "latency.svg"
    command = [sys.executable, str(FOLDER / "plot.py"), str(result), str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r'<g id="line2d_\d+">', picture.read_text())) > len(_TITLES)


@pytest.mark.parametrize(("proxies", "measured_per_s"), [(4, 51_991), (6, 62_413)])
def test_layouts_on_16_cores_are_predicted_from_one_proxy_with_few_and_many_connections(
    proxies: int, measured_per_s: float
) -> None:
    """The figures are those of docs/performance.md; the core of the one proxy was full."""
    costs = {"proxy": Cost.fit({128: 1e6 / 12_308, 512: 1e6 / 17_299})}
    predicted_per_s = proxies / stages_at(costs, Layout(replicas=4, proxies=proxies), connections=512)["proxy"] * 1e6
    assert predicted_per_s == pytest.approx(measured_per_s, rel=0.06)


_TITLES = {
    "penstock-async": "Penstock, `async def`",
    "penstock": "Penstock, `def`",
    "ray-haproxy": "Ray Serve, HAProxy mode, `async def`",
    "ray-haproxy-def": "Ray Serve, HAProxy mode, `def`",
    "mosec": "Mosec",
    "litserve": "LitServe",
    "ray": "Ray Serve, default",
    "uvicorn": "uvicorn + Starlette, no backend at all",
}


def _section(page: Path, title: str) -> str:
    return page.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
