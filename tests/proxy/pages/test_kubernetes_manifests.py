"""The manifests of docs/operations.md: their names, ports, paths and times are those of Penstock and of this Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from click import Context

from penstock.broker.wire.keys import Keys
from penstock.serve import BackendConfig, HTTPOptions
from penstock.serve.cli.entry_point import penstock
from penstock.serve.node.ray_node import DEAD_NODES
from tests.proxy.site import Site

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
MANIFESTS: dict[str, dict[str, Any]] = {
    manifest["kind"]: manifest
    for block in re.findall(r"(?ms)^```yaml\n(.*?)^```", PAGE)
    for manifest in yaml.safe_load_all(block)
    if "kind" in manifest
}
WORKERS = MANIFESTS["RayCluster"]["spec"]["workerGroupSpecs"][0]
WORKER = WORKERS["template"]["spec"]
HEAD = MANIFESTS["RayCluster"]["spec"]["headGroupSpec"]
CONTAINERS = [HEAD["template"]["spec"]["containers"][0], WORKER["containers"][0]]
VARIABLES: dict[str, Any] = {variable["name"]: variable.get("value") for variable in CONTAINERS[1]["env"]}


def test_there_are_the_manifests_that_the_page_describes() -> None:
    assert {"RayCluster", "Service", "ScaledObject"} <= MANIFESTS.keys()
    assert [container["image"] for container in CONTAINERS] == [CONTAINERS[0]["image"]] * 2
    assert CONTAINERS[0]["env"] == CONTAINERS[1]["env"]


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_is_one_of_penstock_or_of_ray(name: str) -> None:
    if name.startswith("PENSTOCK_"):
        assert f"`{name}`" in (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
        return
    package = Path(ray.__file__).parent
    constants, settings = package / "_private/ray_constants.py", package / "core/src/ray/raylet/raylet"
    in_constants = f'"{name}"'.encode() in constants.read_bytes()
    assert in_constants or name.removeprefix("RAY_").encode() in settings.read_bytes()


def test_replicas_run_at_the_niceness_of_the_page() -> None:
    assert VARIABLES["RAY_worker_niceness"] == "0"


def test_nodes_count_as_dead_as_soon_as_with_penstock_node() -> None:
    assert {name: VARIABLES[name] for name in DEAD_NODES} == DEAD_NODES


def test_ray_options_are_known() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for group in (HEAD, WORKERS):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_a_pod_is_killed_later_than_its_longest_drain() -> None:
    drain_s, grace_s = (
        float(VARIABLES["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]),
        WORKER["terminationGracePeriodSeconds"],
    )
    options = HTTPOptions()
    assert grace_s > drain_s
    assert drain_s > options.drain_delay_s + options.request_timeout_s
    assert drain_s > BackendConfig().graceful_shutdown_timeout_s


async def test_the_probe_asks_a_page_of_the_proxy_at_its_port(site: Site) -> None:
    probe = CONTAINERS[1]["readinessProbe"]
    assert probe["httpGet"]["port"] == HTTPOptions().port
    response = await site.http.get(probe["httpGet"]["path"])
    assert (response.status_code, response.text) == (200, "ok")
    # Balancers learn of a drain before the proxy refuses connections.
    assert probe["periodSeconds"] * probe["failureThreshold"] < HTTPOptions().drain_delay_s
    assert "livenessProbe" not in CONTAINERS[1]


def test_the_service_selects_the_workers() -> None:
    spec = MANIFESTS["Service"]["spec"]
    cluster = MANIFESTS["RayCluster"]["metadata"]["name"]
    assert spec["selector"] == {"ray.io/cluster": cluster, "ray.io/group": WORKERS["groupName"]}
    assert [port["targetPort"] for port in spec["ports"]] == [HTTPOptions().port]


def test_keda_scales_by_the_stream_of_a_backend() -> None:
    (trigger,) = MANIFESTS["ScaledObject"]["spec"]["triggers"]
    assert trigger["type"] == "redis-streams"
    assert trigger["metadata"]["stream"] == Keys("default").requests("greeter")
    assert int(trigger["metadata"]["streamLength"]) > 0


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(penstock [a-z]+ --[^`]+)`", PAGE))))
def test_each_command_has_the_options_that_the_page_gives(line: str) -> None:
    name = line.split()[1]
    with Context(penstock) as context:
        command = penstock.get_command(context, name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
    if name == "node":  # which passes all others on to `ray start`
        known |= {"--head", "--address", "--port", "--num-cpus"}
    assert {option.partition("=")[0] for option in re.findall(r"--[\w-]+=?", line)} <= known
