"""The wait for a rollout, status by status."""

import logging
from dataclasses import replace

import pytest

from penstock import serve
from penstock.broker.registry.records import BackendRecord
from penstock.broker.registry.reports import BackendStatus
from penstock.handles.errors import BackendError, to_wire
from penstock.serve.rollout_wait import NODES_WAIT_S, RolloutWait

RECORD = BackendRecord(tag="f", version="v1", code="")
WAITING = BackendStatus(version="v1", config_version=1, wanted=1, starting=1, waits_for_nodes="1 replica with CPU 2")


def test_a_rollout_is_over_when_it_is_complete() -> None:
    wait = RolloutWait(RECORD, 0.0)
    status = BackendStatus(version="v1", config_version=1, wanted=1, starting=1)
    assert not wait.is_over(None, 0.1)
    assert not wait.is_over(status, 0.2)
    assert wait.is_over(replace(status, rolled_out=True), 0.3)


def test_a_replica_that_cannot_start_ends_the_wait() -> None:
    failing = to_wire(BackendError("ValueError", "no"))
    with pytest.raises(BackendError, match="no"):
        RolloutWait(RECORD, 0.0).is_over(replace(WAITING, failing=failing), 0.1)


def test_resources_that_no_node_will_have_end_the_wait_at_once() -> None:
    with pytest.raises(serve.errors.ConfigError, match="backend 'f': 1 replica with GPU 1"):
        RolloutWait(RECORD, 0.0).is_over(replace(WAITING, waits_for_nodes=None, lacking="1 replica with GPU 1"), 0.1)


def test_a_person_who_waits_for_nodes_is_shown_why_once_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    wait, more = RolloutWait(RECORD, 0.0), replace(WAITING, waits_for_nodes="2 replicas with CPU 2")
    with caplog.at_level(logging.WARNING):
        for at_s, status in enumerate([WAITING, WAITING, more, more, replace(WAITING, waits_for_nodes=None)]):
            assert not wait.is_over(status, float(at_s))
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'f' waits for nodes, which Ray's autoscaler may add: 1 replica with CPU 2",
        "backend 'f' waits for nodes, which Ray's autoscaler may add: 2 replicas with CPU 2",
    ]


def test_the_wait_for_a_node_ends_when_none_has_come_for_long() -> None:
    wait = RolloutWait(RECORD, 0.0)
    assert not wait.is_over(WAITING, 10.0)
    assert not wait.is_over(WAITING, 10.0 + NODES_WAIT_S)
    # A node has joined: the time begins anew.
    fewer = replace(WAITING, waits_for_nodes="1 replica with CPU 1")
    assert not wait.is_over(fewer, 11.0 + NODES_WAIT_S)
    assert not wait.is_over(fewer, 11.0 + 2 * NODES_WAIT_S)
    with pytest.raises(serve.errors.ConfigError, match=r"has added no node for it within 900 s: `ray status`"):
        wait.is_over(fewer, 12.0 + 2 * NODES_WAIT_S)
