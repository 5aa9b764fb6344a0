"""Groups of tests that run in one process, where a run has several: each starts one Ray, or one container."""

from __future__ import annotations

import re
import zlib
from importlib import import_module
from typing import Any

import pytest

RAY = "cluster"
"""The fixture that starts a Ray."""

BROKERS = "brokers"
"""The fixture that starts brokers, on which those that give a broker to a test depend."""

_GROUPS = {
    "several nodes": r"tests/serve/nodes/",
    "ray": r"""(?x)tests/(
        serve/test_(?!(config|registry_changes|rollout_wait|validation)\.)\w+\.py
      | serve/(changing|users)/
      | serve/starting/test_(?!(forks|starting)\.)\w+\.py
      | serve/running/test_(run|waiting_client)\.py
      | serve/(cli/test_lifetime|controller/test_(actors|controller)|status/test_status)\.py
      | faults/test_draining\.py
    )""",
    "ray, and faults": r"""(?x)tests/faults/(
        test_(?!(phases|refused_writes|streams)\.)\w+\.py | test_refused_writes\.py::test_refusals_of_writes_
    )""",
    "applications, behind one proxy": r"tests/workers/asgi/test_behind_a_proxy\.py",
    "a cluster in containers": r"tests/containers/",
    "containers of redis": r".*\[.*\bredis-container\b",
    "containers of valkey": r".*\[.*\bvalkey-container\b",
}
"""Which tests belong to a group, by their ids: the first that matches counts. The others of a module are a group."""

_WITH_RAY = {"several nodes", "ray, and faults", "ray"}

_FIRST = (
    "a cluster in containers",
    "ray",
    "several nodes",
    "ray, and faults",
    "containers of redis",
    "containers of valkey",
)
"""The groups that begin first, in this order, as they take longest."""

_ONE_AFTER_THE_OTHER = {"several nodes": "several nodes, then faults", "ray, and faults": "several nodes, then faults"}
"""Groups that one process runs, so that no more than two Rays compute at once: they would starve on two cores."""

_SLOW = re.compile(
    r"""tests/(
      broker/embedded/test_server
    | broker/transport/test_(cluster|sentinels)
    | clients/test_openai
    | containers/\w+
    | handles/files/test_(memory|s3)
    | handles/outages/test_(broker_deaths|sentinel_failover)
    | proxy/test_server
    | security/\w+
    | serve/(cli|cli/batch|nodes)/\w+
    | serve/starting/test_(forks|lifetimes|starting)
    | serve/test_examples
    | support/test_forks
    | test_(benchmarks|snippets)
    | testing/test_(applications|pages)
    | workers/test_(serving|streams)
    )\.py""",
    re.VERBOSE,
)
"""Modules whose tests start processes, such as brokers, or read large files. `make check` leaves them out."""


def group_of(test: str) -> str:
    """Return the group of a test, by its id; its module if it is in none of `_GROUPS`."""
    return next((group for group, ids in _GROUPS.items() if re.match(ids, test)), test.partition("::")[0])


def check_group(item: pytest.Item) -> None:
    """Raise ``UsageError`` if a test starts a Ray and its group has none: it would start one more in any process."""
    if RAY in getattr(item, "fixturenames", ()) and (group := group_of(item.nodeid)) not in _WITH_RAY:
        raise pytest.UsageError(f"{item.nodeid} uses Ray and is in the group {group!r}: add it to tests/groups.py")


def groups_first(items: list[pytest.Item]) -> None:
    """Sort tests so that the longest groups begin first, and what is left fills the other processes."""
    items.sort(key=lambda item: _turn_of(group_of(item.nodeid)))


def _turn_of(group: str) -> tuple[int, int]:
    """Return where a group comes: the `_FIRST`, then slow modules, then the others.

    Neighbours of one folder wait for the same things, or compute alike, so modules come in the order of a checksum.
    """
    if group in _FIRST:
        return 0, _FIRST.index(group)
    return 1 if is_slow_module(group) else 2, zlib.crc32(group.encode())


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands each group to one process, in the order of `groups_first`.

    The ``loadgroup`` of pytest-xdist 3.8 does not: it adds the group to an attribute that pytest 9.2 no longer reads.
    """
    scheduling: Any = import_module("xdist.scheduler").LoadScopeScheduling(config, log)
    scheduling._split_scope = _process_of
    config.option.loadscopereorder = False  # that order is by the number of tests, not by their time
    return scheduling


def _process_of(test: str) -> str:
    """Return what tests of one process have in common."""
    return _ONE_AFTER_THE_OTHER.get(group := group_of(test), group)


def is_slow(item: pytest.Item) -> bool:
    """Return whether a test needs a broker, a Ray or a container, or is one of a module whose tests take seconds."""
    needs = set(getattr(item, "fixturenames", ()))
    return bool(needs & {RAY, BROKERS}) or is_slow_module(item.nodeid)


def is_slow_module(path: str) -> bool:
    """Return whether all tests of a module are slow, so that it need not even be imported for the others."""
    return re.match(_SLOW, path) is not None
