"""Reports of Ray's autoscaler. A cluster that version 2 enlarges is in test_growing.py."""

import json

import pytest

from penstock.serve.controller.placement import Growth
from penstock.serve.ray_nodes import growth
from tests.support.waiting import wait_until


def test_a_cluster_that_was_started_by_hand_does_not_grow(cluster: str) -> None:
    def is_told() -> bool:
        try:
            return growth() is None
        except LookupError:
            return False  # Ray reports its nodes some seconds after its start.

    wait_until(is_told)


def answer_with(monkeypatch: pytest.MonkeyPatch, status: bytes | None) -> None:
    """Let the status of the autoscaler's version 1 be ``status``."""

    def get(key: bytes) -> bytes | None:
        return status

    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", get)


def test_version_1_of_the_autoscaler_is_known_by_the_types_of_its_nodes(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of a second cluster: what that version writes, with the types of `ray up`.
    report = {"autoscaler_report": {"active_nodes": {"ray.head.default": 1, "ray.worker.default": 2}}}
    answer_with(monkeypatch, json.dumps(report).encode())
    assert growth() == Growth(adds_nodes=True)


@pytest.mark.parametrize("answer", [None, b"{}", b'{"autoscaler_report": null}', b"not JSON"])
def test_an_answer_that_tells_nothing_is_not_taken_for_a_no(
    cluster: str, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    answer_with(monkeypatch, answer)
    with pytest.raises(LookupError, match="Ray does not tell of its autoscaler"):
        growth()
