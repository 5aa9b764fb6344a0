"""Runs the first example of the README with the installed package, and checks its output. For `make dist`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    found = re.search(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    script = found[1].replace("serve.start()", 'serve.start(http_options={"port": 0})')
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    if ran.stdout != found[2]:
        sys.exit(f"the README's example printed {ran.stdout!r}\n{ran.stderr}")


if __name__ == "__main__":
    main()
