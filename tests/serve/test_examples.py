"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_ensemble_of_two_models_and_a_combiner(cluster: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "ensemble.py"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.strip().split(": accuracy ") for line in ran.stdout.splitlines())
    accuracy = {name: float(share) for name, share in said.items()}
    assert accuracy.keys() == {"linear", "forest", "ensemble"}
    assert min(accuracy.values()) > 0.9
    assert accuracy["ensemble"] >= max(accuracy["linear"], accuracy["forest"])
