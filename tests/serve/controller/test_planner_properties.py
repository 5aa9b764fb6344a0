"""The planner on generated states of a cluster, and on a simulated cluster that changes between passes."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings, strategies as st

from penstock.serve.controller.backend_status import describe
from penstock.serve.controller.backoff import Failures
from penstock.serve.controller.placement import Growth, Node, count_fits
from penstock.serve.controller.planner import (
    PurgeBackend,
    StartProxy,
    StartReplica,
    plan,
)
from penstock.serve.controller.state import (
    ActorState,
    DesiredBackend,
    DesiredProxies,
    DesiredState,
    ObservedProxy,
    ObservedReplica,
    ObservedState,
)
from tests.serve.controller.planning import ROOMY, apply, backend, replica, see, want

_drain_times = st.sampled_from([None, None, 90.0, 115.0, 150.0, 10_000.0])
"""When nodes must be empty; it is 100 now, and most of them stay."""

TAGS, VERSIONS, NODES = ("f", "g"), ("v1", "v2"), ("node-a", "node-b", "node-c")


@st.composite
def desired_states(draw: st.DrawFn) -> DesiredState:
    backends = [
        DesiredBackend(
            tag=tag,
            version=draw(st.sampled_from(VERSIONS)),
            replicas=draw(st.integers(0, 4)),
            resources=draw(st.sampled_from([{}, {"CPU": 0.5}, {"CPU": 1.0}, {"CPU": 2.0}])),
        )
        for tag in draw(st.sets(st.sampled_from(TAGS)))
    ]
    http = DesiredProxies(
        nodes=tuple(sorted(draw(st.sets(st.sampled_from(NODES))))),
        per_node=draw(st.integers(1, 3)),
        port=draw(st.sampled_from([0, 8000])),
    )
    return DesiredState(backends={backend.tag: backend for backend in backends}, http=http)


@st.composite
def seen_states(draw: st.DrawFn) -> ObservedState:
    replicas = draw(
        st.lists(
            st.builds(
                ObservedReplica,
                id=st.uuids().map(str),
                backend=st.sampled_from(TAGS),
                version=st.sampled_from(VERSIONS),
                state=st.sampled_from(ActorState),
                node=st.sampled_from(["", *NODES]),
                resources=st.sampled_from([{}, {"CPU": 0.5}, {"CPU": 1.0}]),
                is_drain_awaited=st.booleans(),
            ),
            max_size=8,
            unique_by=lambda replica: replica.id,
        )
    )
    slots = draw(st.sets(st.tuples(st.sampled_from(NODES), st.integers(0, 3)), max_size=6))
    proxies = [
        ObservedProxy(
            id=f"{node}.{i}",
            node=node,
            state=draw(st.sampled_from(ActorState)),
            port=draw(st.sampled_from([0, 8000])),
            is_drain_awaited=draw(st.booleans()),
        )
        for node, i in slots
    ]
    keys = st.tuples(st.sampled_from(TAGS), st.sampled_from(VERSIONS))
    return ObservedState(
        now_s=100.0,
        replicas=replicas,
        proxies=proxies,
        nodes=[Node(node, {"CPU": float(draw(st.integers(0, 8)))}, drained_by_s=draw(_drain_times)) for node in NODES],
        failures=draw(st.dictionaries(keys, st.builds(Failures, st.integers(0, 50), st.floats(0, 100)))),
        proven=frozenset(draw(st.sets(keys))),
        rolled_out=frozenset((*key, 1) for key in draw(st.sets(keys))),
        growth=draw(st.sampled_from([None, None, Growth(), Growth(refused=[{"CPU": 1.0}])])),
        reported=frozenset(draw(st.sets(st.sampled_from(TAGS)))),
    )


def let_time_pass(seen: ObservedState, seconds: float = 100.0) -> ObservedState:
    """Return a later state, in which what was starting is ready and what was draining is gone."""
    replicas = [
        replace(
            replica,
            state={ActorState.STARTING: ActorState.READY, ActorState.DRAINING: ActorState.GONE}.get(
                replica.state, replica.state
            ),
            node=replica.node or next((node.id for node in seen.nodes if node.stays), ""),
        )
        for replica in seen.replicas
    ]
    proxies = [
        replace(
            proxy,
            state={ActorState.STARTING: ActorState.READY, ActorState.DRAINING: ActorState.GONE}.get(
                proxy.state, proxy.state
            ),
            port=proxy.port or 8000,
        )
        for proxy in seen.proxies
    ]
    return replace(seen, replicas=replicas, proxies=proxies, now_s=seen.now_s + seconds)


def stays(seen: ObservedState, replica: ObservedReplica) -> bool:
    return seen.time_left_s(replica.node) is None


def select(seen: ObservedState, tag: str, version: str, *states: ActorState) -> list[ObservedReplica]:
    return [r for r in seen.replicas if r.backend == tag and r.version == version and r.state in states]


@given(desired_states(), seen_states())
def test_the_plan_converges(desired: DesiredState, seen: ObservedState) -> None:
    # The observer desires proxies only on nodes that stay.
    staying = tuple(node for node in desired.http.nodes if seen.time_left_s(node) is None)
    desired = replace(desired, http=replace(desired.http, nodes=staying))
    for _ in range(120):  # until each leaving node's time is over
        seen = let_time_pass(apply(plan(desired, seen), seen, desired))
    assert plan(desired, seen) == []
    assert all(stays(seen, replica) for replica in seen.replicas)
    for proxy in seen.proxies:
        assert proxy.node in desired.http.nodes
    assert len(seen.proxies) == len(desired.http.nodes) * desired.http.per_node
    assert {replica.backend for replica in seen.replicas} | seen.reported <= {*desired.backends}


@given(desired_states(), seen_states())
def test_with_enough_room_the_result_is_the_desired_state(desired: DesiredState, seen: ObservedState) -> None:
    seen = replace(seen, nodes=ROOMY)
    for _ in range(20):
        seen = let_time_pass(apply(plan(desired, seen), seen, desired))
    for tag, wanted in desired.backends.items():
        assert len(select(seen, tag, wanted.version, ActorState.READY)) == wanted.replicas
        assert describe(wanted, seen, None).rolled_out
    assert len(seen.replicas) == sum(wanted.replicas for wanted in desired.backends.values())


@given(desired_states(), seen_states())
def test_it_never_starts_more_replicas_than_desired(desired: DesiredState, seen: ObservedState) -> None:
    before = seen
    after = apply(plan(desired, seen), seen, desired)
    for tag, wanted in desired.backends.items():
        counts = [
            sum(stays(seen, r) for r in select(state, tag, wanted.version, ActorState.STARTING, ActorState.READY))
            for state in (before, after)
        ]
        assert counts[1] <= max(wanted.replicas, counts[0])
    for step in plan(desired, seen):
        if isinstance(step, StartReplica):
            assert step.version == desired.backends[step.backend].version


@given(desired_states(), seen_states())
def test_it_never_stops_the_last_ready_replicas_before_new_ones_are_ready(
    desired: DesiredState, seen: ObservedState
) -> None:
    after = apply(plan(desired, seen), seen, desired)
    for tag, wanted in desired.backends.items():
        # A node that leaves takes its replicas along when its time is over, or if the cluster ends with it.
        can_wait = {
            r.id
            for r in seen.replicas
            if (left_s := seen.time_left_s(r.node)) is None
            or (left_s > wanted.grace_s + 2 and any(count_fits(wanted.resources, [n]) for n in seen.nodes if n.stays))
        }
        was = sum(r.backend == tag and r.state is ActorState.READY and r.id in can_wait for r in seen.replicas)
        now = sum(r.backend == tag and r.state is ActorState.READY for r in after.replicas)
        assert now >= min(was, wanted.replicas)


@given(desired_states(), seen_states())
def test_it_starts_no_more_replicas_than_fit_onto_the_nodes(desired: DesiredState, seen: ObservedState) -> None:
    for tag, wanted in desired.backends.items():
        alone = replace(seen, replicas=[], growth=None)
        started = [s for s in plan(want(wanted), alone) if isinstance(s, StartReplica)]
        held = (
            sum(int(node.resources["CPU"] / wanted.resources["CPU"]) for node in seen.nodes if node.stays)
            if wanted.resources
            else 99
        )
        assert len(started) <= held, tag


@given(desired_states(), seen_states())
def test_each_step_names_an_existing_actor_and_no_actor_has_two_steps(
    desired: DesiredState, seen: ObservedState
) -> None:
    named = [step.id for step in plan(desired, seen) if not isinstance(step, (StartReplica, StartProxy, PurgeBackend))]
    assert len(named) == len(set(named))
    assert set(named) <= {replica.id for replica in seen.replicas} | {proxy.id for proxy in seen.proxies}


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4))
def test_a_rollout_never_has_fewer_ready_replicas_than_desired_in_any_order_of_events(
    chance: random.Random, before: int, wanted: int
) -> None:
    seen = see(*(replica(ActorState.READY, "v1") for _ in range(before)))
    desired = want(backend(version="v2", replicas=wanted))
    lowest = before
    moves = {ActorState.STARTING: ActorState.READY, ActorState.DRAINING: ActorState.GONE}
    while True:
        seen = apply(plan(desired, seen), seen, desired)
        lowest = min(lowest, sum(r.state is ActorState.READY for r in seen.replicas))
        replicas = list(seen.replicas)
        moving = [i for i, r in enumerate(replicas) if r.state in moves]
        if not moving:
            break
        at = chance.choice(moving)
        replicas[at] = replace(replicas[at], state=moves[replicas[at].state])
        seen = replace(seen, replicas=replicas)
    assert lowest >= min(before, wanted)
    assert {(r.version, r.state) for r in seen.replicas} == {("v2", ActorState.READY)}
    assert len(seen.replicas) == wanted
