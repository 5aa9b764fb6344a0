"""Measure how much of a GPU is left behind Penstock, Mosec and Ray Serve, in turn, several rounds; print one table.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --rounds 1 --seconds 2 --only penstock --device simulated

Without a GPU, a small network on the processor takes its place; without PyTorch, a lock that is held for 20 ms a
batch. Run it with the Python that has ``penstock``, PyTorch and torchvision. Peers run in `benchmarks/.peers`, which
`benchmarks/run.py` makes, or with ``--peers-python``; a system whose packages are missing is left out, by name. The
lines over HTTP need wrk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from harness import environment
from harness.measurements import images
from harness.wrk import LoadFailed
from run import in_turn, leave, machine, names, page, say


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = ["direct", *(server.name for server in images.SERVERS)]
    parser.add_argument("--only", type=names(systems), help=f"systems: {','.join(systems)}")
    parser.add_argument("--device", choices=images.DEVICES, help="instead of the best that there is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each load")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--proxies", type=int, default=min(4, max(1, cores // 4)), help="of Penstock")
    parser.add_argument("--peers-python", type=Path, default=environment.PYTHON)
    parser.add_argument("--output", type=Path, default=environment.HERE / "results")
    return parser.parse_args()


def main() -> int:
    """Run what was asked for. The exit code is 1 if a system failed or gave a wrong answer."""
    asked = parse()
    signal.signal(signal.SIGTERM, leave)
    device = asked.device or images.find_device()
    libraries = ("numpy",) if device == "simulated" else ("numpy", "torch", "torchvision")
    pythons = {server.name: asked.peers_python if server.is_peer else Path(sys.executable) for server in images.SERVERS}
    skipped, servers = dict[str, str](), dict[str, images.ImageServer]()
    for server in images.SERVERS:
        if reason := images.missing(pythons[server.name], (*server.modules, *libraries)):
            skipped[server.title] = reason
        else:
            servers[server.name] = server
    if shutil.which("wrk") is None:
        skipped["all lines over HTTP"] = "wrk is not installed; on Debian and Ubuntu: apt-get install wrk"
    shown, seen, failures = device, list[images.Classified](), list[str]()

    def turn(name: str, number: int) -> None:
        nonlocal shown
        if name == "direct":
            shown, found = images.direct(device, asked.seconds, say)
        else:
            found = images.visit(
                servers[name], pythons[name], device, proxies=asked.proxies, seconds=asked.seconds, say=say
            )
        seen.extend(found)

    in_turn(["direct", *servers], asked, turn, failures)
    failures += [
        f"{one.system}, {one.workload}, {one.how} {one.in_flight}: {one.not_answered} wrong or not answered"
        for one in seen
        if one.not_answered
    ]
    asked.threads, asked.method = min(4, max(1, (os.cpu_count() or 1) // 4)), "POST"
    facts = machine(asked.peers_python)
    report = page(facts, asked, [images.markdown(shown, asked.proxies, seen, skipped)], failures)
    asked.output.mkdir(parents=True, exist_ok=True)
    stem = asked.output / time.strftime("gpu-%Y-%m-%d-%H%M%S")
    stem.with_suffix(".md").write_text(report)
    options = {key: str(value) for key, value in vars(asked).items()}
    result = {
        "machine": facts, "options": options, "device": shown, "skipped": skipped,
        "seen": [asdict(one) for one in seen], "failures": failures,
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1))
    print(report)
    print(f"\nwritten to {stem}.md and .json", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoadFailed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("broken off")
