"""The steps of the planner in single cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.broker.registry.reports import RefusedChange
from penstock.serve.controller.backend_status import describe, refused_change
from penstock.serve.controller.backoff import STEADY_AFTER_S, Failures
from penstock.serve.controller.placement import Growth, Node
from penstock.serve.controller.planner import (
    DrainProxy,
    DrainReplica,
    ForgetProxy,
    ForgetReplica,
    KillProxy,
    KillReplica,
    PurgeBackend,
    StartProxy,
    StartReplica,
    Step,
    lacking,
    plan,
)
from penstock.serve.controller.state import (
    ActorState,
    DesiredProxies,
    ObservedProxy,
)
from tests.serve.controller.planning import ROOMY, apply, backend, replica, see, want

LEAVING, STAYING = Node("node-a", {"CPU": 4.0}, drained_by_s=160.0), Node("node-b", {"CPU": 4.0})


def test_missing_replicas_are_started() -> None:
    assert plan(want(backend(replicas=2)), see()) == [StartReplica("f", "v1")] * 2


def test_scaling_down_stops_starting_replicas_first_and_then_the_youngest() -> None:
    oldest, youngest, starting = replica(ActorState.READY), replica(ActorState.READY), replica(ActorState.STARTING)
    steps = plan(want(backend(replicas=1)), see(oldest, youngest, starting))
    assert steps == [KillReplica(starting.id), DrainReplica(youngest.id, 20.0)]


def test_a_new_version_starts_beside_the_old_one() -> None:
    old = replica(ActorState.READY, "v1")
    assert plan(want(backend(version="v2")), see(old)) == [StartReplica("f", "v2")]
    starting = replica(ActorState.STARTING, "v2")
    assert plan(want(backend(version="v2")), see(old, starting)) == []
    ready = replace(starting, state=ActorState.READY)
    assert plan(want(backend(version="v2")), see(old, ready)) == [DrainReplica(old.id, 20.0)]


def test_a_new_version_that_cannot_start_leaves_the_old_one_serving() -> None:
    old, failed = replica(ActorState.READY, "v1"), replica(ActorState.FAILED, "v2")
    failures = {("f", "v2"): Failures(1, 0.0)}
    assert plan(want(backend(version="v2")), see(old, failed, failures=failures)) == [KillReplica(failed.id)]


def test_returning_to_the_old_version_stops_only_the_new_one() -> None:
    old, new = replica(ActorState.READY, "v1"), replica(ActorState.STARTING, "v2")
    assert plan(want(backend(version="v1")), see(old, new)) == [KillReplica(new.id)]


def test_a_rollout_on_a_full_cluster_needs_room_for_one_replica() -> None:
    old = [replica(ActorState.READY, "v1") for _ in range(2)]
    desired = want(backend(version="v2", replicas=2))
    nodes = [Node("node-a", {"CPU": 3.0})]
    assert plan(desired, see(*old, nodes=nodes)) == [StartReplica("f", "v2")]
    assert lacking(desired.backends["f"], see(*old, nodes=nodes)) is None
    full = see(*old, nodes=[Node("node-a", {"CPU": 2.0})])
    assert plan(desired, full) == []
    assert "1 replica with CPU 1 each requested, room for 0: node node-a has CPU 2 (0 unused)" in (
        lacking(desired.backends["f"], full) or ""
    )


def test_a_backend_that_does_not_fit_is_not_started_and_the_shortage_is_described() -> None:
    big = backend(cpus=64, replicas=2)
    seen = see(nodes=[Node("node-a", {"CPU": 2.0})])
    assert plan(want(big), seen) == []
    assert lacking(big, seen) == "2 replicas with CPU 64 each requested, room for 0: node node-a has CPU 2"
    assert describe(big, seen, None).lacking == lacking(big, seen)


def test_a_backend_that_fits_in_part_is_not_started_unless_it_was_complete_before() -> None:
    many = backend(replicas=5)
    seen = see(replica(ActorState.READY), nodes=[Node("node-a", {"CPU": 3.0})])
    says = "5 replicas with CPU 1 each requested, room for 3: node node-a has CPU 3"
    assert plan(want(many), seen) == []
    assert lacking(many, seen) == says
    lost_a_node = replace(seen, rolled_out=frozenset({("f", "v1", 1)}))
    assert plan(want(many), lost_a_node) == [StartReplica("f", "v1")] * 2
    assert lacking(many, apply(plan(want(many), lost_a_node), lost_a_node, want(many))) == says


# -- clusters that Ray's autoscaler enlarges

SMALL_NODE = (Node("node-a", {"CPU": 1.0}),)


def test_on_a_cluster_that_can_grow_replicas_without_room_are_started_and_wait_in_ray() -> None:
    desired = want(backend(replicas=3))
    seen = see(nodes=SMALL_NODE, growth=Growth())
    assert plan(desired, seen) == [StartReplica("f", "v1")] * 3
    after = apply(plan(desired, seen), seen, desired)
    assert plan(desired, after) == []
    status = describe(desired.backends["f"], after, None)
    assert status.waits_for_nodes == "3 replicas with CPU 1 each requested, room for 1: node node-a has CPU 1"
    assert status.lacking is None
    grown = replace(after, nodes=[*SMALL_NODE, Node("node-b", {"CPU": 2.0})])
    assert describe(desired.backends["f"], grown, None).waits_for_nodes is None


def test_a_replica_on_a_node_that_has_just_joined_waits_for_none() -> None:
    joined, waits = replica(ActorState.READY, node="node-b", cpus=2.0), replica(ActorState.STARTING, node="", cpus=2.0)
    seen = see(joined, nodes=SMALL_NODE, growth=Growth())
    status = describe(backend(cpus=2.0), seen, None)
    assert (status.rolled_out, status.waits_for_nodes) == (True, None)
    seen = see(joined, waits, nodes=SMALL_NODE, growth=Growth())
    missing = "1 replica with CPU 2 each requested, room for 0: node node-a has CPU 1"
    assert describe(backend(replicas=2, cpus=2.0), seen, None).waits_for_nodes == missing


def test_a_change_that_waits_for_nodes_can_be_undone() -> None:
    desired = want(backend(replicas=3))
    seen = see(replica(ActorState.READY), nodes=SMALL_NODE, growth=Growth())
    waiting = apply(plan(desired, seen), seen, desired)
    assert len(waiting.replicas) == 3
    fewer = want(backend(replicas=1))
    assert apply(plan(fewer, waiting), waiting, fewer).replicas[0] == seen.replicas[0]
    killed = [step.id for step in plan(fewer, waiting) if isinstance(step, KillReplica)]
    assert killed == [replica.id for replica in reversed(waiting.replicas[1:])]
    assert len(plan(want(), waiting)) == 3


def test_a_rollout_on_a_full_cluster_that_can_grow_asks_for_room_for_one_replica() -> None:
    old = [replica(ActorState.READY, "v1") for _ in range(2)]
    desired = want(backend(version="v2", replicas=2))
    seen = see(*old, nodes=[Node("node-a", {"CPU": 2.0})], growth=Growth())
    assert plan(desired, seen) == [StartReplica("f", "v2")]
    waiting = apply(plan(desired, seen), seen, desired)
    assert plan(desired, waiting) == []
    status = describe(desired.backends["f"], waiting, None)
    assert (status.waits_for_nodes or "").startswith("1 replica with CPU 1 each requested, room for 0: ")


def test_what_the_autoscaler_refuses_is_missing_and_one_replica_goes_on_asking() -> None:
    desired, refusing = want(backend(replicas=3)), Growth(refused=[{"GPU": 1.0}, {"CPU": 1.00001}])
    seen = see(nodes=SMALL_NODE, growth=refusing, rolled_out=frozenset({("f", "v1", 1)}))
    assert plan(desired, seen) == [StartReplica("f", "v1")]
    seen = see(replica(ActorState.READY), nodes=SMALL_NODE, growth=refusing)
    assert plan(desired, seen) == [StartReplica("f", "v1")]
    waiting = apply(plan(desired, seen), seen, desired)
    assert plan(desired, waiting) == []
    status = describe(desired.backends["f"], waiting, None)
    assert status.lacking == "3 replicas with CPU 1 each requested, room for 1: node node-a has CPU 1"
    assert status.waits_for_nodes is None


def test_before_ray_tells_whether_it_adds_nodes_nothing_is_started_or_refused() -> None:
    seen = see(nodes=SMALL_NODE, knows_growth=False)
    assert plan(want(backend(replicas=3)), seen) == []
    status = describe(backend(replicas=3), seen, None)
    assert (status.lacking, status.waits_for_nodes, status.rolled_out) == (None, None, False)


def test_an_undone_change_that_waited_for_nodes_is_reported_with_what_was_missing() -> None:
    waiting = describe(backend(replicas=3), see(nodes=SMALL_NODE, growth=Growth()), None)
    back = describe(replace(backend(), config_version=2), see(replica(ActorState.READY), nodes=SMALL_NODE), None)
    refused = refused_change(waiting, back)
    assert refused is not None
    assert refused.lacking == waiting.waits_for_nodes


def test_a_replica_on_a_node_that_drains_waits_for_a_node_that_may_come() -> None:
    leaving = replica(ActorState.READY)
    seen = see(leaving, nodes=[LEAVING], now_s=100.0)
    assert plan(want(backend()), seen) == [DrainReplica(leaving.id, 20.0)]
    assert plan(want(backend()), replace(seen, growth=Growth())) == [StartReplica("f", "v1")]


def test_a_node_that_returns_gets_what_is_missing_and_takes_no_running_replica_over() -> None:
    node_a, node_b = Node("node-a", {"CPU": 2.0}), Node("node-b", {"CPU": 2.0})
    desired, rolled_out = want(backend(replicas=3)), frozenset({("f", "v1", 1)})
    left = see(*(replica(ActorState.READY) for _ in range(2)), nodes=[node_a], rolled_out=rolled_out)
    assert plan(desired, left) == []
    assert plan(desired, replace(left, nodes=[node_a, node_b])) == [StartReplica("f", "v1")]
    crowded = see(*(replica(ActorState.READY) for _ in range(3)), nodes=[ROOMY[0], node_b], rolled_out=rolled_out)
    assert plan(desired, crowded) == []


def test_a_replica_that_died_is_forgotten_and_replaced_in_one_pass() -> None:
    gone = replica(ActorState.GONE)
    seen = see(gone, failures={("f", "v1"): Failures(1, 0.0)}, proven=frozenset({("f", "v1")}))
    assert plan(want(backend()), seen) == [ForgetReplica(gone.id), StartReplica("f", "v1")]


def test_restarts_of_a_version_that_keeps_failing_back_off_exponentially() -> None:
    failures, now_s, pauses = Failures(), 0.0, list[float]()
    for _ in range(9):
        failures = failures.plus_one(now_s)
        failed_at_s = now_s
        while plan(want(backend()), see(failures={("f", "v1"): failures}, now_s=now_s)) == []:
            now_s += 0.5
        pauses.append(now_s - failed_at_s)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize("deaths", [1, 2, 5, 20, 1_000])
def test_a_version_that_was_ready_once_is_restarted_within_two_seconds_after_any_number_of_deaths(deaths: int) -> None:
    failures = Failures()
    for number in range(deaths):
        failures = failures.plus_one(5.0 * number)
    assert failures.allows_start(failures.last_s + 2.0, proven=True)


def test_failures_are_forgiven_after_a_while() -> None:
    failures = Failures(10, last_s=0.0)
    assert failures.plus_one(61.0) == Failures(1, 61.0)
    assert failures.allows_start(61.0, proven=False)


def test_the_death_of_a_replica_that_was_ready_for_a_while_delays_nothing() -> None:
    young = Failures().plus_one(0.0).plus_one(1.0)
    assert not young.allows_start(1.0, proven=True)
    assert Failures().plus_one(0.0, ready_s=STEADY_AFTER_S) == Failures()
    # It does not forgive the earlier failures either.
    assert young.plus_one(1.2, ready_s=STEADY_AFTER_S) == young


def test_a_deleted_backend_is_stopped_and_then_purged() -> None:
    left = [replica(state) for state in ActorState]
    named = {r.state: r.id for r in left}
    assert set(plan(want(), see(*left, reported=frozenset({"f"})))) == {
        KillReplica(named[ActorState.STARTING]),
        DrainReplica(named[ActorState.READY], 0.0),
        KillReplica(named[ActorState.FAILED]),
        ForgetReplica(named[ActorState.GONE]),
    }
    assert plan(want(), see(reported=frozenset({"f"}))) == [PurgeBackend("f")]


def test_a_restarted_controller_continues_a_drain() -> None:
    draining = replace(replica(ActorState.DRAINING), is_drain_awaited=False)
    assert plan(want(backend(replicas=0)), see(draining)) == [DrainReplica(draining.id, 20.0)]
    assert plan(want(backend(replicas=0)), see(replace(draining, is_drain_awaited=True))) == []


def test_proxies_fill_their_slots() -> None:
    http = DesiredProxies(nodes=("node-a", "node-b"), per_node=2, port=8000)
    steps = plan(want(http=http), see())
    assert [(step.id, step.node, step.port) for step in steps if isinstance(step, StartProxy)] == [
        ("node-a.0", "node-a", 8000),
        ("node-a.1", "node-a", 8000),
        ("node-b.0", "node-b", 8000),
        ("node-b.1", "node-b", 8000),
    ]


def test_with_port_0_all_proxies_use_the_port_that_the_first_one_picked() -> None:
    http = DesiredProxies(nodes=("node-a",), per_node=3, port=0)
    assert plan(want(http=http), see()) == [StartProxy("node-a.0", "node-a", 0)]
    first = ObservedProxy(id="node-a.0", node="node-a", state=ActorState.STARTING)
    assert plan(want(http=http), see(proxies=[first])) == []
    found = replace(first, state=ActorState.READY, port=41234)
    assert plan(want(http=http), see(proxies=[found])) == [
        StartProxy("node-a.1", "node-a", 41234),
        StartProxy("node-a.2", "node-a", 41234),
    ]


def test_proxies_follow_the_nodes() -> None:
    http = DesiredProxies(nodes=("node-b",))
    leaving = ObservedProxy(id="node-a.0", node="node-a", state=ActorState.READY, port=8000)
    assert plan(want(http=http), see(proxies=[leaving])) == [StartProxy("node-b.0", "node-b", 8000)]
    new = ObservedProxy(id="node-b.0", node="node-b", state=ActorState.STARTING)
    assert plan(want(http=http), see(proxies=[leaving, new])) == []
    assert plan(want(http=http), see(proxies=[leaving, replace(new, state=ActorState.READY)])) == [
        DrainProxy("node-a.0")
    ]
    assert plan(want(http=DesiredProxies()), see(proxies=[leaving])) == [DrainProxy("node-a.0")]


def test_replicas_of_a_node_that_drains_are_replaced_before_they_drain() -> None:
    leaving = [replica(ActorState.READY) for _ in range(2)]
    seen = see(*leaving, nodes=[LEAVING, STAYING], now_s=100.0)
    desired = want(backend(replicas=2))
    assert plan(desired, seen) == [StartReplica("f", "v1")] * 2
    new = [replica(ActorState.STARTING, node="node-b") for _ in range(2)]
    assert plan(desired, replace(seen, replicas=[*leaving, *new])) == []
    new[0] = replace(new[0], state=ActorState.READY)
    assert plan(desired, replace(seen, replicas=[*leaving, *new])) == [DrainReplica(leaving[1].id, 20.0)]


def test_a_replica_that_cannot_be_replaced_serves_until_its_grace_period_must_begin() -> None:
    leaving, other = replica(ActorState.READY), replica(ActorState.READY, tag="g", node="node-b", cpus=4)
    desired = want(backend(), backend("g", cpus=4))
    for now_s, steps in ((100.0, []), (137.0, []), (139.0, [DrainReplica(leaving.id, 19.0)])):
        assert plan(desired, see(leaving, other, nodes=[LEAVING, STAYING], now_s=now_s)) == steps
    assert "node node-b has CPU 4 (0 unused)" in (
        lacking(desired.backends["f"], see(leaving, other, nodes=[LEAVING, STAYING], now_s=100.0)) or ""
    )


def test_where_no_node_stays_replicas_drain_once_the_proxies_have() -> None:
    leaving = replica(ActorState.READY)
    proxy = ObservedProxy(id="node-a.0", node="node-a", state=ActorState.READY, port=8000)
    desired = want(backend())
    assert plan(desired, see(leaving, nodes=[LEAVING], now_s=100.0, proxies=[proxy])) == [DrainProxy("node-a.0", 60.0)]
    draining = replace(proxy, state=ActorState.DRAINING)
    assert plan(desired, see(leaving, nodes=[LEAVING], now_s=100.0, proxies=[draining])) == []
    assert plan(desired, see(leaving, nodes=[LEAVING], now_s=100.0)) == [DrainReplica(leaving.id, 20.0)]


def test_a_replica_that_starts_on_a_node_that_drains_is_ended() -> None:
    starting = replica(ActorState.STARTING)
    seen = see(starting, nodes=[LEAVING, STAYING], now_s=100.0)
    assert plan(want(backend()), seen) == [StartReplica("f", "v1"), KillReplica(starting.id)]


def test_the_proxy_of_a_node_that_leaves_soon_drains_although_no_other_is_ready() -> None:
    http = DesiredProxies(nodes=("node-b",), drain_s=15.0)
    proxies = [
        ObservedProxy(id="node-a.0", node="node-a", state=ActorState.READY, port=8000),
        ObservedProxy(id="node-b.0", node="node-b", state=ActorState.STARTING),
    ]
    for now_s, steps in ((144.0, []), (146.0, [DrainProxy("node-a.0", 14.0)])):
        assert plan(want(http=http), see(nodes=[LEAVING, STAYING], now_s=now_s, proxies=proxies)) == steps


@pytest.mark.parametrize(("state", "step"), [(ActorState.GONE, ForgetProxy), (ActorState.FAILED, KillProxy)])
def test_a_proxy_that_failed_or_ended_is_replaced(state: ActorState, step: type[Step]) -> None:
    http = DesiredProxies(nodes=("node-a",))
    steps = plan(want(http=http), see(proxies=[ObservedProxy(id="node-a.0", node="node-a", state=state)]))
    assert isinstance(steps[0], step)
    assert steps[1:] == ([StartProxy("node-a.0", "node-a", 8000)] if state is ActorState.GONE else [])


def test_a_rollout_is_complete_when_every_replica_applies_the_configuration() -> None:
    wanted = replace(backend(replicas=2), config_version=2)
    old_config, new_config = replica(ActorState.READY), replace(replica(ActorState.READY), config_version=2)
    assert not describe(wanted, see(new_config, old_config), None).rolled_out
    assert describe(wanted, see(new_config, replace(old_config, config_version=2)), None).rolled_out
    assert not describe(wanted, see(new_config, new_config, replica(ActorState.READY, "v0")), None).rolled_out
    assert describe(wanted, see(new_config, new_config, replica(ActorState.DRAINING, "v0")), None).rolled_out
    takes = replace(replica(ActorState.DRAINING, "v0"), may_claim=True)
    assert not describe(wanted, see(new_config, new_config, takes), None).rolled_out


def test_a_refused_change_is_reported_until_a_later_one_is_rolled_out() -> None:
    error = {"kind": "BackendError", "args": ["ValueError", "no"]}
    wanted = replace(backend(replicas=1, version="v1"), config_version=3)
    failed = describe(replace(wanted, version="v2", config_version=2), see(replica(ActorState.READY)), error)
    assert refused_change(None, failed) is None
    back = describe(wanted, see(replica(ActorState.READY)), None)
    refused = refused_change(failed, back)
    assert refused == RefusedChange(version="v2", failing=error, lacking=None, undone_by=3)
    back = replace(back, refused=refused, rolled_out=True)
    assert refused_change(back, back) == refused
    changing = replace(back, config_version=4, rolled_out=False, refused=None)
    assert refused_change(back, changing) == refused
    assert refused_change(replace(changing, refused=refused), replace(changing, rolled_out=True)) is None
