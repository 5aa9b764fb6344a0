import math

import pytest
from hypothesis import given, strategies as st

from penstock.serve.controller.placement import Node, asked, free, room, shortage


def test_a_replica_asks_for_one_cpu_unless_told_otherwise() -> None:
    assert asked({}) == {"CPU": 1}
    assert asked({"num_cpus": 0}) == {}
    assert asked({"num_cpus": 0.25, "resources": {"disk": 1}}) == {"CPU": 0.25, "disk": 1}


def test_room_is_counted_node_by_node() -> None:
    """Half a GPU here and half a GPU there are no whole one."""
    nodes = [Node("a", {"CPU": 3, "GPU": 0.5}), Node("b", {"CPU": 2, "GPU": 0.5})]
    assert room({"GPU": 1}, nodes) == 0
    assert room({"CPU": 2}, nodes) == 2
    assert room({"CPU": 1, "GPU": 0.25}, nodes) == 4
    assert room({}, nodes) == math.inf


@given(st.integers(1, 40))
def test_parts_add_up_in_spite_of_rounding(parts: int) -> None:
    node = Node("a", {"CPU": 1.0})
    taken = [("a", {"CPU": 1 / parts})] * (parts - 1)
    assert room({"CPU": 1 / parts}, free([node], taken)) == 1


def test_what_is_not_placed_yet_is_counted_where_it_fits() -> None:
    nodes = [Node("a", {"CPU": 1}), Node("b", {"CPU": 4})]
    left = free(nodes, [("", {"CPU": 2}), ("b", {"CPU": 1}), ("gone", {"CPU": 9}), ("", {"CPU": 9})])
    assert {node.id: node.resources["CPU"] for node in left} == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("number", "taken", "says"),
    [
        (3, [], "3 replicas with CPU 2 each asked for, room for 1: node aaaaaaaa has CPU 3"),
        (
            1,
            [("aaaaaaaaaa", {"CPU": 2})],
            "1 replica with CPU 2 each asked for, room for 0: node aaaaaaaa has ",
        ),
        (1, [("aaaaaaaaaa", {"CPU": 2})], "CPU 3 (1 unused)"),
    ],
)
def test_a_shortage_says_what_was_asked_for_and_what_there_is(
    number: int, taken: list[tuple[str, dict[str, float]]], says: str
) -> None:
    nodes = [Node("aaaaaaaaaa", {"CPU": 3})]
    assert says in shortage(number, {"CPU": 2}, nodes, free(nodes, taken))


def test_a_shortage_without_nodes_says_so() -> None:
    assert "the cluster has no node" in shortage(1, {"CPU": 1}, [], [])
