"""An environment of their own for the peers, so that their requirements never meet ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
REQUIREMENTS = HERE / "peers.txt"
FOLDER = HERE / ".peers"
PYTHON = FOLDER / "bin" / "python"
STAMP = FOLDER / ".installed"
INSTALL_WITHIN_S = 1_800


def prepare() -> Path:
    """Return the peers' Python; install the packages of ``peers.txt`` unless they are installed."""
    wanted = hashlib.sha256(sys.version.encode() + REQUIREMENTS.read_bytes()).hexdigest()
    if not (STAMP.exists() and STAMP.read_text() == wanted):
        print(f"installing the peers into {FOLDER} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True, timeout=300)
        subprocess.run(
            [str(PYTHON), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)],
            check=True, timeout=INSTALL_WITHIN_S,
        )  # fmt: skip
        STAMP.write_text(wanted)
    return PYTHON
