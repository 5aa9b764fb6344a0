import math
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from penstock.serve.controller.placement import (
    HEAD_ONLY_GRACE_S,
    IDLE_NODE_S,
    Growth,
    Node,
    NodeUse,
    count_fits,
    describe_shortage,
    head_only_node,
    resources_of,
    unused,
)


def test_a_replica_reserves_one_cpu_by_default() -> None:
    assert resources_of({}) == {"CPU": 1}
    assert resources_of({"num_cpus": 0}) == {}
    assert resources_of({"num_cpus": 0.25, "resources": {"disk": 1}}) == {"CPU": 0.25, "disk": 1}


def test_room_is_counted_node_by_node() -> None:
    """Half a GPU on each of two nodes is not a whole GPU."""
    nodes = [Node("a", {"CPU": 3, "GPU": 0.5}), Node("b", {"CPU": 2, "GPU": 0.5})]
    assert count_fits({"GPU": 1}, nodes) == 0
    assert count_fits({"CPU": 2}, nodes) == 2
    assert count_fits({"CPU": 1, "GPU": 0.25}, nodes) == 4
    assert count_fits({}, nodes) == math.inf


@given(st.integers(1, 40))
def test_fractions_of_a_resource_add_up_despite_rounding(parts: int) -> None:
    node = Node("a", {"CPU": 1.0})
    taken = [("a", {"CPU": 1 / parts})] * (parts - 1)
    assert count_fits({"CPU": 1 / parts}, unused([node], taken)) == 1


def test_a_reservation_without_a_node_is_counted_where_it_fits() -> None:
    nodes = [Node("a", {"CPU": 1}), Node("b", {"CPU": 4})]
    left = unused(nodes, [("", {"CPU": 2}), ("b", {"CPU": 1}), ("gone", {"CPU": 9}), ("", {"CPU": 9})])
    assert {node.id: node.resources["CPU"] for node in left} == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("number", "taken", "message"),
    [
        (3, [], "3 replicas with CPU 2 each requested, room for 1: node aaaaaaaa has CPU 3"),
        (
            1,
            [("aaaaaaaaaa", {"CPU": 2})],
            "1 replica with CPU 2 each requested, room for 0: node aaaaaaaa has ",
        ),
        (1, [("aaaaaaaaaa", {"CPU": 2})], "CPU 3 (1 unused)"),
    ],
)
def test_a_shortage_names_what_was_requested_and_what_there_is(
    number: int, taken: list[tuple[str, dict[str, float]]], message: str
) -> None:
    nodes = [Node("aaaaaaaaaa", {"CPU": 3})]
    assert message in describe_shortage(number, {"CPU": 2}, nodes, unused(nodes, taken))


def test_a_shortage_on_a_cluster_without_nodes_says_so() -> None:
    assert "the cluster has no node" in describe_shortage(1, {"CPU": 1}, [], [])


HEAD = Node("head", {}, address="10.0.0.1", is_head=True)
START = Node("start", {}, address="10.0.0.2")
OTHER = Node("another", {}, address="10.0.0.3")


@pytest.mark.parametrize(
    ("nodes", "gone_s", "chosen"),
    [
        ([OTHER, HEAD, START], 0.0, "start"),
        ([OTHER, HEAD], HEAD_ONLY_GRACE_S - 1, None),
        ([OTHER, HEAD], HEAD_ONLY_GRACE_S, "head"),
        ([OTHER], HEAD_ONLY_GRACE_S, "another"),
        ([OTHER, HEAD, Node("returned", {}, address="10.0.0.2")], 0.0, "returned"),
        ([OTHER, HEAD, Node("returned", {}, address="10.0.0.2")], 1000.0, "returned"),
        ([OTHER, HEAD, replace(START, drained_by_s=9.0)], 0.0, "head"),
        ([OTHER, replace(HEAD, drained_by_s=9.0)], HEAD_ONLY_GRACE_S, "another"),
        ([replace(START, drained_by_s=9.0)], 0.0, None),
        ([], 1000.0, None),
    ],
)
def test_the_one_proxy_follows_the_node_of_start_its_address_and_then_the_head(
    nodes: list[Node], gone_s: float, chosen: str | None
) -> None:
    assert head_only_node(nodes, "start", "10.0.0.2", gone_s) == chosen


def test_without_a_known_address_only_the_id_counts() -> None:
    assert head_only_node([Node("a", {}), HEAD], "start", "", 0.0) is None


def test_an_autoscaler_may_bring_a_node_unless_it_refuses_just_these_resources() -> None:
    growth = Growth(refused=[{"CPU": 1.0, "GPU": 1.0}, {"CPU": 4.0}])
    assert not growth.may_bring({"CPU": 4})
    assert not growth.may_bring({"GPU": 1, "CPU": 1})
    assert growth.may_bring({"CPU": 1})
    assert growth.may_bring({"CPU": 4, "GPU": 1})
    assert growth.may_bring({})


def test_a_node_is_idle_some_time_after_its_last_replica() -> None:
    use, nodes = NodeUse(), [HEAD, START, OTHER]
    assert use.idle(nodes, {"start"}, 100.0) == set()
    assert use.idle(nodes, {"start"}, 100.0 + IDLE_NODE_S - 1) == set()
    assert use.idle(nodes, {"start"}, 100.0 + IDLE_NODE_S) == {"another"}
    late_s = 100.0 + 2 * IDLE_NODE_S
    assert use.idle(nodes, set(), late_s) == {"start", "another"}
    assert use.idle(nodes, {"another"}, late_s + 1) == {"start"}


def test_a_node_that_joins_again_is_not_idle() -> None:
    use = NodeUse()
    use.idle([OTHER], set(), 0.0)
    assert use.idle([OTHER], set(), IDLE_NODE_S) == {"another"}
    assert use.idle([], set(), IDLE_NODE_S + 1) == set()
    assert use.idle([OTHER], set(), IDLE_NODE_S + 2) == set()
