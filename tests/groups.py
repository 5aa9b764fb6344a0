"""Groups of tests that run in one process, where a run has several: each group starts one Ray, or one container."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

RAY = "cluster"
"""The fixture that starts a Ray."""

BROKERS = "brokers"
"""The fixture that starts brokers, on which those that give a broker to a test depend."""

_GROUPS = {
    "several nodes": r"tests/serve/test_(every_node|growing|head|leaving_nodes)\.py",
    "ray, and faults": r"""(?x)tests/(
        faults/test_(?!(phases|refused_writes|streams)\.)\w+\.py
      | faults/test_refused_writes\.py::test_refusals_of_writes_
      | serve/test_(asgi|examples|http_options|lifetimes|run|users)\.py
    )""",
    "ray": r"""(?x)tests/serve/(
        test_(?!(config|forks|registry_changes|rollout_wait|starting|validation)\.)\w+\.py
      | cli/test_lifetime\.py | controller/test_(actors|controller)\.py | status/test_status\.py
    )""",
    "applications, behind one proxy": r"tests/proxy/test_asgi\.py",
    "a cluster in containers": r"tests/containers/",
    "containers of redis": r".*\[.*\bredis-container\b",
    "containers of valkey": r".*\[.*\bvalkey-container\b",
}
"""Which tests belong to a group, by their ids: the first that matches counts. They begin in the order of `_FIRST`."""

_FIRST = ("ray", "ray, and faults", "containers of redis", "containers of valkey", "several nodes")
"""The longest groups, early; but no more than two start a Ray at once, which would starve each other on two cores."""

_SLOW = re.compile(
    r"""tests/(
      broker/embedded/test_server
    | broker/transport/test_(cluster|sentinels)
    | clients/test_openai
    | containers/\w+
    | handles/files/test_(memory|s3)
    | handles/test_(broker_deaths|sentinel_failover)
    | proxy/test_server
    | security/\w+
    | serve/cli/\w+
    | serve/test_(every_node|examples|forks|growing|head|leaving_nodes|lifetimes|starting)
    | test_(benchmarks|forks|snippets)
    | testing/test_(applications|pages)
    | workers/test_(serving|streams)
    )\.py""",
    re.VERBOSE,
)
"""Modules whose tests start processes, such as brokers, or read large files. `make check` leaves them out."""


def group_of(test: str) -> str:
    """Return the group of a test; its own id if it may run in any process."""
    return next((group for group, ids in _GROUPS.items() if re.match(ids, test)), test)


def check_group(item: pytest.Item) -> None:
    """Raise ``UsageError`` if a test starts a Ray and its group has none: it would start one more in any process."""
    if RAY in getattr(item, "fixturenames", ()) and "ray" not in (group := group_of(item.nodeid)):
        raise pytest.UsageError(f"{item.nodeid} uses Ray and is in the group {group!r}: add it to tests/groups.py")


def groups_first(items: list[pytest.Item]) -> None:
    """Sort tests so that the longest groups begin first, and what is left fills the other processes."""
    order = {group: number for number, group in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands each group to one process, in the order of `groups_first`.

    The ``loadgroup`` of pytest-xdist 3.8 does not: it adds the group to an attribute that pytest 9.2 no longer reads.
    """
    scheduling: Any = import_module("xdist.scheduler").LoadScopeScheduling(config, log)
    scheduling._split_scope = group_of
    config.option.loadscopereorder = False  # that order is by the number of tests, not by their time
    return scheduling


def is_slow(item: pytest.Item) -> bool:
    """Return whether a test needs a broker, a Ray or a container, or is one of a module whose tests take seconds."""
    needs = set(getattr(item, "fixturenames", ()))
    return bool(needs & {RAY, BROKERS}) or is_slow_module(item.nodeid)


def is_slow_module(path: str) -> bool:
    """Return whether all tests of a module are slow, so that it need not even be imported for the others."""
    return re.match(_SLOW, path) is not None
