"""The systems that answer HTTP, and how each is asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import environment

PROGRAMS = environment.HERE / "systems"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the table: a program of ``systems/`` that serves on the port it is given."""

    name: str
    title: str
    program: str
    path: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    is_peer: bool = True
    get: bool = True
    """Whether it answers GET; every system answers POST."""
    ready_within_s: float = 90.0

    def command(self, *, port: int, workload: str, replicas: int) -> list[str]:
        """The command that starts it. Peers run in the peers' environment, Penstock in that of this process."""
        python = environment.PYTHON if self.is_peer else Path(sys.executable)
        asked = ["--port", str(port), "--workload", workload, "--replicas", str(replicas)]
        return [str(python), str(PROGRAMS / self.program), *asked]


ASYNC, DEF = "PENSTOCK_BENCH_ASYNC", "RAY_BENCH_DEF"
"""Environment variables by which a server's no-op is `async def` rather than `def`, or the reverse."""

RAY_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
RAY_HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}

SYSTEMS = {
    system.name: system
    for system in (
        System(name="penstock", title="Penstock", program="http/penstock_server.py", is_peer=False, env=RAY_QUIET),
        System(
            name="penstock-async", title="Penstock, `async def`", program="http/penstock_server.py", is_peer=False,
            env={**RAY_QUIET, ASYNC: "1"},
        ),
        System(name="path", title="Penstock without Ray", program="http/path_server.py", is_peer=False),
        System(
            name="path-xadd", title="Penstock without Ray, bare, `XADD`", program="http/path_server.py",
            is_peer=False, env={"PENSTOCK_BENCH_BARE": "xadd"},
        ),
        System(
            name="path-script", title="Penstock without Ray, bare, script", program="http/path_server.py",
            is_peer=False, env={"PENSTOCK_BENCH_BARE": "script"},
        ),
        System(name="ray", title="Ray Serve, default", program="http/ray_serve.py", env=RAY_QUIET),
        System(
            name="ray-haproxy", title="Ray Serve, HAProxy, throughput mode", program="http/ray_serve.py",
            env={**RAY_QUIET, **RAY_HAPROXY},
        ),
        System(
            name="ray-haproxy-def", title="Ray Serve, HAProxy, throughput mode, `def`", program="http/ray_serve.py",
            env={**RAY_QUIET, **RAY_HAPROXY, DEF: "1"},
        ),
        System(name="litserve", title="LitServe", program="http/litserve_server.py", path="/predict", get=False),
        System(name="mosec", title="Mosec", program="http/mosec_server.py", path="/inference", get=False),
        System(name="uvicorn", title="uvicorn + Starlette, no backend", program="http/bare_uvicorn.py"),
    )
}  # fmt: skip
