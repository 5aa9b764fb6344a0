"""An application's file: every mistake with its line, and what it would change."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

from hypothesis import given, settings, strategies as st

from penstock.broker.registry.records import BackendRecord, EndpointRecord, Snapshot
from penstock.serve.config import BackendConfig
from penstock.serve.deploy.manifest import Manifest, ManifestChange, plan, read
from penstock.workers.executing.user_code import dump

NOTHING = Snapshot()


def application(text: str, seen: Snapshot = NOTHING) -> Manifest:
    declared, mistakes = read(dedent(text), seen)
    assert mistakes == []
    return declared


def mistakes(text: str, seen: Snapshot = NOTHING) -> list[str]:
    return [str(mistake) for mistake in read(dedent(text), seen)[1]]


WHOLE = """\
    backends:
      digits:
        import: models.digits:Digits
        args: [0.5, [1, 2]]
        kwargs: {scale: true}
        config: {num_replicas: 2, max_batch_size: 32}
        ray_actor_options: {num_cpus: 0.5}
        runtime_env: {env_vars: {A: b}}
      next:
        import: models.digits:Next
    endpoints:
      digit:
        route: /digit/{n:int}
        methods: [post]
        call_methods: [predict, __call__]
        traffic: {digits: 0.9, next: 0.1}
        shadows: {next: 0.5}
      plain:
        backend: next
"""


def test_what_is_declared_is_read() -> None:
    declared = application(WHOLE)
    digits = declared.backends["digits"]
    assert digits.code == ("models.digits:Digits", (0.5, [1, 2]), {"scale": True})
    assert digits.config == BackendConfig(num_replicas=2, max_batch_size=32)
    assert (digits.actor_options, digits.runtime_env) == ({"num_cpus": 0.5}, {"env_vars": {"A": "b"}})
    assert declared.endpoints == {
        "digit": EndpointRecord(
            name="digit",
            route="/digit/{n:int}",
            methods=("POST",),
            traffic={"digits": 0.9, "next": 0.1},
            shadows={"next": 0.5},
            call_methods=("predict", "__call__"),
        ),
        "plain": EndpointRecord(name="plain", traffic={"next": 1.0}),
    }


def test_every_mistake_has_its_line() -> None:
    text = """\
        backends:
          no name:
            import: a:b
          digits:
            import: nowhere
            args: {a: 1}
            config:
              num_replicas: 0
              max_batchsize: 3
              allow_pickle: 1
            ray_actor_options: {cpus: 1}
            colour: red
          bare: {}
          bare: {import: "a:b"}
        endpoints:
          one:
            route: no-slash
            methods: [FETCH]
            backend: nobody
          two:
            route: /two
            backend: digits
            traffic: {digits: 1}
          three:
            traffic: {digits: 0.5}
            shadows: {digits: 2, ghost: 0.1}
          four: 4
        extras: {}
    """
    said = mistakes(text)
    lines = [int(mistake.removeprefix("line ").partition(":")[0]) for mistake in said]
    assert lines == sorted(lines)
    assert set(lines) == {2, 5, 6, 8, 9, 10, 11, 12, 13, 14, 17, 18, 19, 23, 25, 26, 27, 28}
    for line, part in {
        2: "'no name'",
        6: "args of backend 'digits' must be a list, not a mapping",
        8: "num_replicas",
        12: "it may have import, args",
        13: "needs an 'import'",
        14: "'bare' twice",
        19: "nobody",
        23: "needs one of them",
        25: "sum to 1",
        28: "'extras'",
    }.items():
        assert any(mistake.startswith(f"line {line}:") and part in mistake for mistake in said), (line, said)


def test_a_runtime_env_that_cannot_be_has_its_line_too() -> None:
    text = """\
        backends:
          digits:
            import: a:b
            runtime_env:
              py_modules: here
    """
    assert mistakes(text) == ["line 5: py_modules of runtime_env must be a list, not str"]


def test_what_is_no_yaml_is_told_with_its_line() -> None:
    assert mistakes("backends:\n  a: [1, 2\nendpoints: {}\n")[0].startswith("line 3: this is not YAML")
    assert mistakes("") == ["line 1: the file is empty; it declares backends and endpoints"]
    assert mistakes("- a\n- b\n") == ["line 1: the file must be a mapping, not a list"]
    assert mistakes("backends: 3\n") == ["line 1: backends must be a mapping, not '3'"]


def test_routes_must_not_clash_with_each_other_or_with_what_there_is() -> None:
    there = Snapshot(1, {"b": record("b")}, {"old": EndpointRecord(name="old", route="/x", traffic={"b": 1.0})})
    said = mistakes(
        """\
        endpoints:
          one: {route: /x, backend: b}
          two: {route: /y, backend: b}
          three: {route: /y, backend: b}
        """,
        there,
    )
    assert len(said) == 2
    assert said[0].startswith("line 2: endpoint 'one' has the route of endpoint 'old'")
    assert said[1].startswith("line 4: endpoint 'three' has the route of endpoint 'two'")
    assert mistakes("endpoints:\n  old: {route: /x, backend: b}\n", there) == []


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["backends", "endpoints", "import", "config", "route", "traffic", "a", "b"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
def test_any_file_is_read_or_refused(value: Any) -> None:
    import yaml

    declared, wrong = read(yaml.safe_dump(value, allow_unicode=True), NOTHING)
    assert wrong or isinstance(declared, Manifest)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    read(text, NOTHING)


# -- what it would change


def record(tag: str, target: str = "a:b", args: tuple[Any, ...] = (), **config: Any) -> BackendRecord:
    return BackendRecord(tag=tag, version="1", code=tag, config=BackendConfig(**config).spec())


def deployed(declared: Manifest) -> tuple[Snapshot, dict[str, bytes]]:
    """What there is once ``declared`` was deployed."""
    backends = {
        tag: BackendRecord(
            tag=tag,
            version="1",
            code=tag,
            config=backend.config.spec(),
            actor_options=backend.actor_options,
            runtime_env=backend.runtime_env,
        )
        for tag, backend in declared.backends.items()
    }
    codes = {
        tag: dump(backend.target, backend.args, backend.kwargs) + b"1" for tag, backend in declared.backends.items()
    }
    return Snapshot(1, backends, declared.endpoints), codes


def test_what_was_deployed_changes_nothing_the_second_time() -> None:
    seen, codes = deployed(application(WHOLE))
    assert plan(application(WHOLE, seen), seen, codes) == []


def test_each_change_is_the_least_that_does() -> None:
    seen, codes = deployed(application(WHOLE))

    def steps(old: str, new: str) -> list[tuple[str, str, str]]:
        assert old in WHOLE
        return [(s.verb, s.kind, s.name) for s in plan(application(WHOLE.replace(old, new), seen), seen, codes)]

    assert steps("num_replicas: 2", "num_replicas: 3") == [("configure", "backend", "digits")]
    assert steps("models.digits:Digits", "models.digits:Other") == [("update", "backend", "digits")]
    assert steps("args: [0.5,", "args: [0.6,") == [("update", "backend", "digits")]
    assert steps("num_cpus: 0.5", "num_cpus: 1") == [("update", "backend", "digits")]
    assert steps("digits: 0.9, next: 0.1", "digits: 0.8, next: 0.2") == [("update", "endpoint", "digit")]
    assert steps("      plain:\n        backend: next\n", "") == []


def test_code_that_is_no_plain_value_is_replaced_and_not_run() -> None:
    seen, codes = deployed(application(WHOLE))
    codes["next"] = dump(print, (), {})
    (step,) = plan(application(WHOLE, seen), seen, codes)
    assert (step.verb, step.name) == ("update", "next")


def test_only_pruning_deletes_and_it_deletes_endpoints_first() -> None:
    seen, codes = deployed(application(WHOLE))
    assert plan(Manifest({}, {}), seen, codes) == []
    assert plan(Manifest({}, {}), seen, codes, prune=True) == [
        ManifestChange("delete", "endpoint", "digit"),
        ManifestChange("delete", "endpoint", "plain"),
        ManifestChange("delete", "backend", "digits"),
        ManifestChange("delete", "backend", "next"),
    ]


def test_steps_say_what_changes() -> None:
    seen, codes = deployed(application(WHOLE))
    changed = application(WHOLE.replace("num_replicas: 2", "num_replicas: 3"), seen)
    assert [str(step) for step in plan(changed, seen, codes)] == ["configure backend digits: num_replicas 2 -> 3"]
    assert [str(step) for step in plan(application(WHOLE), NOTHING, {})] == [
        "create backend digits: models.digits:Digits, 2 replicas",
        "create backend next: models.digits:Next, 1 replicas",
        "create endpoint digit: POST /digit/{n:int}",
        "create endpoint plain: for handles alone",
    ]
