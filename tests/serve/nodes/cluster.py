"""A Ray cluster of several nodes on one machine: each has a network namespace and an address of its own.

A node is a network namespace, plugged into a bridge that lies, with the broker, in one more of them. The machine's own
network is neither used nor changed: an address or a port that is taken there is free here, and traffic cannot get out.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from redis import Redis

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.reports import ReportT
from penstock.handles import background_loop
from penstock.serve.instance import Instance
from penstock.serve.node.ray_node import DEAD_NODES
from tests.support.forks import ForkServer, enter_network, shared_forks
from tests.support.ray_workers import ENVIRONMENT, IMPORTS, RayWorkers
from tests.support.waiting import wait_until

T = TypeVar("T")

_PREFIX = "penstock-test"
_NETWORK = "10.213.77"
_HUB = 1
_HEAD = 11
_RAY_PORT, _BROKER_PORT, _RAY_STATE_PORT = 6379, 6380, 6381
_CPUS = 4
_THREADS = 16

_TRIES, _TOO_SLOW = 3, "timed out during startup"
"""``ray start`` gives up 30 s after it has started its processes, which a busy machine can exceed."""

_ENVIRONMENT = {
    **ENVIRONMENT,
    # Prestarted Python processes would slow down the ones that are needed.
    "RAY_prestart_worker_first_driver": "0",
    # As where Penstock starts Ray. With Ray's 15, other tests of this machine starve the replicas.
    "RAY_worker_niceness": "0",
    **DEAD_NODES,
}

_HEAD_ID = "f" * 51 + "0" * 5
_HEAD_TYPE = "ray.head.default"
"""The id and the type that Ray's provider of nodes for tests gives the head."""

_AUTOSCALER_ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}


def _autoscaler(address: str) -> dict[str, Any]:
    """Return a configuration of Ray's autoscaler, whose nodes are processes on this machine.

    As an external provider, because Ray's wheel lacks the defaults that belong to its name.
    """
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    node: dict[str, Any] = {"resources": {"CPU": _CPUS, "object_store_memory": 100 << 20}, "node_config": {}}
    empty: list[str] = []
    return {
        "cluster_name": "tests",
        # What a provider of its own must give, all of it without a meaning here.
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": empty,
        "file_mounts_sync_continuously": False,
        "rsync_exclude": empty,
        "rsync_filter": empty,
        "upscaling_speed": 1.0,
        **{f"{kind}_commands": empty for kind in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": empty for kind in ("head", "worker")},
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {**node, "min_workers": 0, "max_workers": 2},
        },
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
    }


_START_RAY = """
import sys
from ray.scripts.scripts import main

sys.executable, *sys.argv[1:] = sys.argv[1:]  # Ray starts its workers with it
main()
"""

_SCRIPT = """
import json, os, sys
import ray
from penstock import serve

# To Ray, nodes that share a file system differ only by their addresses.
ray.init(address=os.environ["RAY_ADDRESS"], _node_ip_address=sys.argv[1], logging_level="ERROR")
with serve.start(**json.loads(sys.argv[2])) as client:
    print(json.dumps({"http_url": client.http_url}), flush=True)
    sys.stdin.read()
"""


class Namespace:
    """A network namespace. Functions called in it, and processes that they start, use only its network."""

    def __init__(self, name: str) -> None:
        self.name = name
        _ip("netns", "add", name)
        self._threads = ThreadPoolExecutor(_THREADS, name, _enter, (name,))
        _ip("-n", name, "link", "set", "lo", "up")

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self._threads.submit(function, *args, **kwargs).result()

    def kill_all(self) -> None:
        """Kill every process in it (SIGKILL)."""
        _kill_all(self.name)

    def pids(self, title: str) -> list[int]:
        """Return the processes in it that have ``title`` in their command line, without those that fork workers."""
        lines = {pid: _command_line(pid) for pid in _pids(self.name)}
        return [pid for pid, line in lines.items() if title in line and not RayWorkers.made(line)]

    def delete(self) -> None:
        self._threads.shutdown()
        self.kill_all()
        _ip("netns", "delete", self.name)


class Node:
    """A node of the cluster."""

    def __init__(self, hub: Namespace, namespace: Namespace, number: int, workers: RayWorkers) -> None:
        self._workers = workers
        self.address = f"{_NETWORK}.{number}"
        self.namespace = namespace
        self._hub, self._plug = hub, f"plug{number}"
        name = namespace.name
        _ip("-n", hub.name, "link", "add", self._plug, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", hub.name, "link", "set", self._plug, "master", "bridge", "up")
        _ip("-n", name, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        # Ray detects its own address by this route. No packet uses it.
        _ip("-n", name, "route", "add", "default", "via", f"{_NETWORK}.{_HUB}")

    def run(self, *command: str, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        ours = {**_ENVIRONMENT, "RAY_ADDRESS": f"{_NETWORK}.{_HEAD}:{_RAY_PORT}"}
        environment = {**os.environ, **ours, **(environment or {})}
        return self.namespace.call(subprocess.Popen, command, env=environment, text=True, **options)

    def start_ray(self, *arguments: str, cpus: int = _CPUS, **environment: str) -> None:
        """Return when the node has joined the cluster, or has started it."""
        command = (
            *(str(_forks().python), "-c", _START_RAY, str(self._workers.python), "start", *arguments),
            *(f"--node-ip-address={self.address}", f"--num-cpus={cpus}", f"--object-store-memory={100 << 20}"),
            *("--disable-usage-stats", "--include-log-monitor=false"),
        )
        for tries_left in reversed(range(_TRIES)):
            with tempfile.TemporaryFile("w+") as log:  # Not a pipe, which the daemons would keep open.
                starting = self.run(
                    *command, environment=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
                if not starting.wait(120):
                    return
                log.seek(0)
                said = log.read()
            if not tries_left or _TOO_SLOW not in said:
                pytest.fail(f"ray start {' '.join(arguments)} failed:\n{said}")
            self.kill()  # what it has started by then

    def penstock_node(self, *arguments: str, cpus: int = _CPUS) -> subprocess.Popen[str]:
        """Start ``penstock node``, which joins the cluster."""
        return self.run(
            *(sys.executable, "-c", "from penstock.serve.cli import main; main()", "node", *arguments),
            *(f"--address={_NETWORK}.{_HEAD}:{_RAY_PORT}", f"--node-ip-address={self.address}", f"--num-cpus={cpus}"),
            *(f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--include-log-monitor=false"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def kill(self) -> None:
        """Kill the node like a loss of power, except that each of its connections is reset."""
        self.namespace.kill_all()

    def unplug(self) -> None:
        """Cut the node off the network: its connections stay open and silent."""
        _ip("-n", self._hub.name, "link", "set", self._plug, "down")


class Cluster:
    """A head node, and the nodes that are added."""

    def __init__(self, *, keep_ray_state: bool = False, grows: bool = False) -> None:
        """See `cluster`."""
        self._keep_ray_state, self._grows = keep_ray_state, grows
        self._ending = ExitStack()
        self._added = 0

    def __enter__(self) -> Cluster:
        with ExitStack() as undo:
            self._workers = undo.enter_context(RayWorkers(agents=True))
            self._hub = Namespace(f"{_PREFIX}-{os.getpid()}")
            undo.callback(self._hub.delete)
            name = self._hub.name
            _ip("-n", name, "link", "add", "bridge", "type", "bridge")
            _ip("-n", name, "address", "add", f"{_NETWORK}.{_HUB}/24", "dev", "bridge")
            _ip("-n", name, "link", "set", "bridge", "up")
            self._folder = tempfile.mkdtemp(
                prefix="ray-"
            )  # A short path, because Ray creates Unix sockets deep below it.
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self.near_url = self._start_redis(undo, _BROKER_PORT)
            """The broker's URL for this process."""
            self.redis_url = f"redis://{_NETWORK}.{_HUB}:{_BROKER_PORT}"
            """The broker's URL for the nodes."""
            if self._keep_ray_state:
                self._start_redis(undo, _RAY_STATE_PORT)
            self.head = self._plugged_in(undo, _HEAD)
            self.start_head()
            self._ending = undo.pop_all()
        return self

    def _start_redis(self, undo: ExitStack, port: int) -> str:
        """Start a broker that all nodes reach at ``port`` of the hub; return the URL for this process."""
        server = self._hub.call(EmbeddedServer.start)
        undo.callback(server.stop)
        with Redis.from_url(server.url) as redis:
            redis.config_set("bind", f"{_NETWORK}.{_HUB}")
            redis.config_set("protected-mode", "no")
            redis.config_set("port", str(port))
        return server.url

    def start_head(self) -> None:
        """Start Ray on the head, also after it was killed."""
        # Ray sees the processes of all nodes, because they share this machine, and takes them for those of the head.
        Path(self._folder, "ray_current_cluster").unlink(missing_ok=True)
        arguments = ["--head", f"--port={_RAY_PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        if self._grows:
            path = Path(self._folder, "autoscaler.json")
            path.write_text(json.dumps(_autoscaler(f"{self.head.address}:{_RAY_PORT}")))
            self.head.start_ray(*arguments, f"--autoscaling-config={path}", cpus=1, **_AUTOSCALER_ENVIRONMENT)
            return
        if not self._keep_ray_state:
            self.head.start_ray(*arguments)
            return
        self.head.start_ray(*arguments, cpus=0, RAY_REDIS_ADDRESS=f"{_NETWORK}.{_HUB}:{_RAY_STATE_PORT}")

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def add_node(self) -> Node:
        """Add a node, and return it when it has joined."""
        node = self.plug_in()
        self.join(node)
        return node

    def join(self, node: Node) -> None:
        """Start Ray on a node, also after it was killed; return when it has joined."""
        node.start_ray(f"--address={self.head.address}:{_RAY_PORT}")

    def plug_in(self) -> Node:
        """Add a node on which nothing runs yet."""
        self._added += 1
        return self._plugged_in(self._ending, _HEAD + self._added)

    def _plugged_in(self, undo: ExitStack, number: int) -> Node:
        namespace = Namespace(f"{self._hub.name}-{number}")
        undo.callback(namespace.delete)
        return Node(self._hub, namespace, number, self._workers)

    @contextmanager
    def instance(
        self, *, on: Node | None = None, detached: bool = False, name: str = "default", **http_options: Any
    ) -> Generator[serve.Client]:
        """Start an instance from a script, on the head unless told otherwise.

        Yields a client of it in this process, which has no Ray there. A detached one has seen the end of its script.
        """
        node = on or self.head
        options = {"redis_url": self.redis_url, "instance": name, "detached": detached, "http_options": http_options}
        script = node.run(
            *(str(_forks().python), "-c", _SCRIPT, node.address, json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder,
        )
        with script:
            try:
                started = json.loads(_first_line(script, within_s=120))
                if detached:
                    _, errors = script.communicate("", timeout=30)
                    assert script.returncode == 0, errors
                with serve.connect(self.near_url, name) as client:
                    assert client.http_url == started["http_url"]
                    yield client
                    client.shutdown()
                if not detached:
                    _, errors = script.communicate("", timeout=30)
                    assert script.returncode == 0, errors
            finally:
                script.kill()

    def reports(self, kind: type[ReportT]) -> dict[str, ReportT]:
        """Return the latest reports of the replicas or proxies of the instance ``default``."""

        async def read() -> dict[str, ReportT]:
            instance = await Instance(self.near_url, "default").open()
            try:
                return await instance.registry.get_reports(kind)
            finally:
                await instance.close()

        return background_loop.run(read())

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call ``function`` in the hub's network, from which all nodes can be reached."""
        return self._hub.call(function, *args, **kwargs)


def _forks() -> ForkServer:
    """Return what runs ``ray start`` and the scripts of the nodes."""
    with mock.patch.dict(os.environ, _ENVIRONMENT):  # Ray reads its settings when it is imported
        return shared_forks(*IMPORTS, "ray.scripts.scripts")


@contextmanager
def cluster(*, keep_ray_state: bool = False, grows: bool = False) -> Generator[Cluster]:
    """Start a `Cluster`; remove all its processes, files and networks at the end.

    With ``keep_ray_state``, Ray's own state lies in a Redis too, and the head is nothing but a head. With ``grows``,
    the head has one CPU, and Ray's autoscaler adds at most two nodes of 4 CPUs, in the network of the head.

    Without the right to make networks, the test is skipped; in CI (``CI=true``) that is a failure.
    """
    if reason := _not_here():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must test on a cluster of several nodes: {reason}")
        pytest.skip(reason)
    _sweep()
    with Cluster(keep_ray_state=keep_ray_state, grows=grows) as cluster:
        yield cluster


def _not_here() -> str | None:
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "there is no `ip`, which the package iproute2 brings, to make networks with"
    name = f"{_PREFIX}-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
    except subprocess.CalledProcessError as e:
        return f"networks cannot be made here, which takes root: {e.stderr.strip()}"
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "delete", name)
    return None


def _sweep() -> None:
    """Remove the networks that a killed test run has left."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        prefix, _, owner = name.partition(f"{_PREFIX}-")
        if not prefix and owner and not Path("/proc", owner.partition("-")[0]).exists():
            _kill_all(name)
            _ip("netns", "delete", name)


def _kill_all(namespace: str) -> None:
    def nobody_is_left() -> bool:
        pids = _pids(namespace)
        for pid in pids:
            assert pid != os.getpid()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(nobody_is_left)


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # The process has just ended.


def _first_line(script: subprocess.Popen[str], within_s: float) -> str:
    assert script.stdout is not None
    assert script.stderr is not None
    too_late = threading.Timer(within_s, script.kill)
    too_late.start()
    line = script.stdout.readline()
    too_late.cancel()
    return line or pytest.fail(f"the script failed:\n{script.stderr.read()}")


def _enter(namespace: str) -> None:
    """Move the calling thread into a namespace."""
    with open(Path("/run/netns", namespace)) as file:
        enter_network(file.fileno())


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout
