import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import certifi
import pytest
from hypothesis import HealthCheck, settings

from tests.faults.load.table import TABLE, Row
from tests.groups import check_group, groups_first, is_slow, is_slow_module, scheduler
from tests.support.brokers import KINDS, Brokers, clean
from tests.support.forks import close_shared_forks
from tests.support.guarded import Guarded, guarded, redis_program
from tests.support.processes import descendants, mark_descendants
from tests.support.ray_workers import RayWorkers
from tests.support.waiting import wait_until

# How long an example takes says nothing where others use the machine too.
settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("penstock"), max_examples=20)
settings.load_profile("penstock")


# A shell has what it runs in the background ignore SIGINT, and a process that a test interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        check_group(item)
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of several processes
        groups_first(items)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no module of slow tests for a run without them."""
    path = os.path.relpath(collection_path, config.rootpath)
    return True if config.option.markexpr == "not slow" and is_slow_module(path) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the rows of the faults' table to the process that prints it, where a run is spread over several."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = [asdict(row) for row in TABLE.rows]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TABLE.rows += [Row(**row) for row in getattr(node, "workeroutput", {}).get("faults", ())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(TABLE.markdown())


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests() -> Iterator[None]:
    """Fail the run if a process that it started, or one that such a process started, is still there after it."""
    mark_descendants()
    yield
    close_shared_forks()
    with suppress(AssertionError):  # the second look says more
        wait_until(lambda: not descendants(), timeout_s=15)
    assert not (left := descendants()), "processes outlived the tests:\n" + "\n".join(left)


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have clients trust one certificate authority of the world's: each reads all of them, in 50 ms, and needs none."""
    create, worlds = ssl.create_default_context, (None, certifi.where(), os.environ.get("SSL_CERT_FILE"))
    bundle, end = Path(certifi.where()).read_text(), "-----END CERTIFICATE-----"
    one = tmp_path_factory.mktemp("authority") / "one.pem"
    one.write_text(bundle.partition(end)[0] + end)

    def create_default_context(*purpose: ssl.Purpose, cafile: str | None = None, **others: Any) -> ssl.SSLContext:
        return create(*purpose, cafile=str(one) if cafile in worlds else cafile, **others)

    with mock.patch.object(ssl, "create_default_context", create_default_context):
        yield


@pytest.fixture(scope="session")
def brokers() -> Iterator[Brokers]:
    with Brokers() as brokers:
        yield brokers


def _do_nothing(_: object) -> None: ...


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """One local Ray for all tests, as it takes seconds to start. Its address."""
    import ray

    # In number, not in kind: its CPUs are shares of those of the machine, and its GPUs are made up.
    there_is: dict[str, Any] = {"num_cpus": 8, "num_gpus": 2, "resources": {"disk": 4}}
    with RayWorkers() as workers:
        with pytest.MonkeyPatch.context() as patch, workers.of_the_ray_that_is_started():
            # As in a Ray that Penstock starts. At Ray's default, 15, the tests that compute leave its workers no time.
            patch.setenv("RAY_worker_niceness", "0")
            # Prestarted Python processes would slow down the ones that are needed.
            patch.setenv("RAY_prestart_worker_first_driver", "0")
            # It would read all that the workers print again and again, for drivers that do not want it.
            patch.setattr("ray._private.node.Node.start_log_monitor", _do_nothing)
            ray.init(address="local", include_dashboard=False, log_to_driver=False, **there_is)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def redis_url(brokers: Brokers) -> Iterator[str]:
    """The embedded server, empty. It is shared, but no two tests see the same data."""
    with clean(brokers.url("embedded")) as url:
        yield url


@pytest.fixture(params=KINDS)
def broker_url(request: pytest.FixtureRequest, brokers: Brokers) -> Iterator[str]:
    """Each kind of broker in turn, empty: the embedded one, Redis and Valkey in containers.

    Without a Docker engine the containers are skipped; in CI (``CI=true``) that is a failure.
    """
    with clean(brokers.url(request.param)) as url:
        yield url


@pytest.fixture(scope="session", params=["valkey", "redis"])
def guarded_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A broker with TLS and users: the embedded Valkey, and the Redis of this machine.

    Without one it is skipped; in CI (``CI=true``) that is a failure.
    """
    if request.param == "redis" and redis_program() is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no redis-server on PATH")
    directory: Path = tmp_path_factory.mktemp(request.param)
    with guarded(directory, tls_by_server=request.param == "redis") as broker:
        yield broker


@pytest.fixture
def guarded_by_users(guarded_broker: Guarded) -> Iterator[Guarded]:
    """It, with nothing in it. A test in which anybody was denied what the document grants must say so by `denied`."""
    guarded_broker.denied()
    yield guarded_broker
    denied = guarded_broker.denied()
    guarded_broker.empty()
    assert not denied
