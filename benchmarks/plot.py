"""Draw latency under load from the JSON of ``make bench``: the 99th percentile of each system at rising rates.

    python benchmarks/plot.py benchmarks/results/2026-11-25-101500.json docs/images/latency.svg

The case is ``open-noop``; over several rounds a point is their median. Needs matplotlib, which
``make setup`` installs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from harness.catalogue import SYSTEMS

matplotlib.use("svg")
from matplotlib import pyplot as plt, ticker

CASE = "open-noop"
OURS, PEERS = "#0b5cad", ("#c2410c", "#9a6700", "#57606a", "#6f42c1", "#1a7f37", "#8250df")


def lines_of(result: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return the points (rate per second, p99 in ms) of each system, in the order of the catalogue."""
    seen: dict[str, dict[int, list[float]]] = {name: {} for name in SYSTEMS}
    for one in result["cases"][CASE]:
        seen[one["system"]].setdefault(one["rate_per_s"], []).append(one["p99_ms"])
    return {
        name: [(rate, median(values)) for rate, values in sorted(rates.items())]
        for name, rates in seen.items()
        if rates
    }


def draw(result: Mapping[str, Any], output: Path) -> None:
    """Write the picture, as SVG or PNG by the name of the file. The same result gives the same file."""
    plt.rcParams.update({"svg.hashsalt": CASE, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    peers = iter(PEERS)
    for name, points in lines_of(result).items():
        peer = SYSTEMS[name].is_peer
        color = next(peers) if peer else OURS
        dashed = "`def`" in SYSTEMS[name].title or name == "penstock"
        axes.plot(
            [rate for rate, _ in points],
            [p99 for _, p99 in points],
            color=color,
            label=title(name),
            linewidth=1.4 if peer else 2.4,
            linestyle="--" if dashed else "-",
            marker="o",
            markersize=3.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="requests per second, at random moments", ylabel="p99, ms")
    axes.set(xticks=sorted({one["rate_per_s"] for one in result["cases"][CASE]}), ylim=(0.5, 30_000))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda ms, _: f"{ms:,.3g}" if ms < 1000 else f"{ms:,.0f}"))
    axes.grid(visible=True, which="major", color="#eaeef2")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    machine = result["machine"]
    axes.set_title(
        f"No-op over HTTP, one replica: latency at a given rate\n{machine['cores']} cores of {machine['cpu']}, "
        f"servers and load together, {machine['when']}",
        loc="left",
        fontsize=10,
    )
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else {}, dpi=150)
    plt.close(figure)


def title(name: str) -> str:
    """Return the name of a system as a label: like the tables, with the kind of its code."""
    shown = SYSTEMS[name].title.replace("`", "").replace(", throughput mode", " mode").replace(", HAProxy", " HAProxy")
    return f"{shown}, def" if name == "penstock" else shown


def main() -> None:
    """Read the arguments, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="the JSON of a sitting with the case open-noop")
    parser.add_argument("output", type=Path, help="the picture: *.svg or *.png")
    asked = parser.parse_args()
    result = json.loads(asked.result.read_text(encoding="utf-8"))
    if CASE not in result["cases"]:
        parser.error(f"{asked.result} has no case {CASE}: make bench ARGS='--cases {CASE}' measures it")
    draw(result, asked.output)


if __name__ == "__main__":
    main()
