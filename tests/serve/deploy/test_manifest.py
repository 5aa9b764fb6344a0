"""The manifest that a file declares, and its mistakes by line."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings, strategies as st

from penstock.broker.registry.records import EndpointRecord, Snapshot
from penstock.serve import ALL_METHODS
from penstock.serve.config import BackendConfig
from penstock.serve.deploy.manifest import Manifest, read
from tests.serve.deploy.manifests import NOTHING, WHOLE, backend_record, manifest, mistakes


def test_backends_and_endpoints_are_read() -> None:
    declared = manifest(WHOLE)
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
    found = mistakes(text)
    lines = [int(mistake.removeprefix("line ").partition(":")[0]) for mistake in found]
    assert lines == sorted(lines)
    assert set(lines) == {2, 5, 6, 8, 9, 10, 11, 12, 13, 14, 17, 18, 19, 23, 25, 26, 27, 28}
    for line, part in {
        2: "'no name'",
        6: "args of backend 'digits' must be a list, not a mapping",
        8: "num_replicas",
        12: "it may have import, asgi, args",
        13: "needs an 'import'",
        14: "'bare' twice",
        19: "nobody",
        23: "leave out one of them",
        25: "sum to 1",
        28: "'extras'",
    }.items():
        assert any(mistake.startswith(f"line {line}:") and part in mistake for mistake in found), (line, found)


APPLICATION = """\
    backends:
      api:
        asgi: web.api:app
    endpoints:
      api:
        route: /api/{path:path}
        methods: all
        backend: api
"""


def test_an_application_is_declared_with_all_methods() -> None:
    declared = manifest(APPLICATION)
    assert repr(declared.backends["api"].deployable) == "asgi('web.api:app')"
    assert declared.endpoints["api"].methods == ALL_METHODS


def test_the_mistakes_of_an_application_have_their_lines() -> None:
    text = """\
        backends:
          both:
            asgi: web.api:app
            import: web.api:f
          arguments:
            asgi: web.api:app
            args: [1]
            kwargs: {a: 1}
          path:
            asgi: web.api
          number:
            asgi: 3
          batches:
            asgi: web.api:app
            config: {max_batch_size: 8}
          misspelled:
            asgy: web.api:app
        endpoints:
          api: {route: /api, methods: any, backend: both}
    """
    assert mistakes(text) == [
        "line 4: backend 'both' has both 'asgi' and 'import'; leave out one of them",
        "line 7: backend 'arguments' has both 'asgi' and 'args'; leave out one of them",
        "line 8: backend 'arguments' has both 'asgi' and 'kwargs'; leave out one of them",
        "line 10: the import path 'web.api' must look like 'package.module:Name'",
        "line 12: asgi must be an import path such as 'package.module:Name', not 3",
        "line 15: max_batch_size is 8, and an ASGI application has no use for it: leave it out",
        "line 16: backend 'misspelled' needs an 'import' such as 'package.module:Name', or an 'asgi' application",
        "line 17: backend 'misspelled' has no 'asgy'; it may have import, asgi, args, kwargs, config, "
        "ray_actor_options, runtime_env",
        "line 19: methods must be a list of str, not str",
    ]


def test_an_invalid_runtime_env_has_its_line() -> None:
    text = """\
        backends:
          digits:
            import: a:b
            runtime_env:
              py_modules: here
    """
    assert mistakes(text) == ["line 5: py_modules of runtime_env must be a list, not str"]


def test_invalid_yaml_has_its_line() -> None:
    assert mistakes("backends:\n  a: [1, 2\nendpoints: {}\n")[0].startswith("line 3: this is not YAML")
    assert mistakes("") == ["line 1: the file is empty; it must declare backends or endpoints"]
    assert mistakes("- a\n- b\n") == ["line 1: the file must be a mapping, not a list"]
    assert mistakes("backends: 3\n") == ["line 1: backends must be a mapping, not '3'"]


def test_retries_are_read_and_their_mistakes_have_their_line() -> None:
    text = """\
        backends:
          f:
            import: a:b
            config:
              retry: {max_attempts: 5, on: [ConnectionError, httpx.TransportError], backoff_s: 0.5}
        """
    retry = manifest(text).backends["f"].config.retry
    assert retry is not None
    assert (retry.max_attempts, retry.on) == (5, ("ConnectionError", "httpx.TransportError"))
    assert mistakes(text.replace("max_attempts: 5", "attempts: 5")) == [
        "line 5: RetryConfig has no field 'attempts'; did you mean 'max_attempts'?"
    ]


def test_routes_must_not_clash_with_each_other_or_with_deployed_ones() -> None:
    deployed = Snapshot(
        1, {"b": backend_record("b")}, {"old": EndpointRecord(name="old", route="/x", traffic={"b": 1.0})}
    )
    found = mistakes(
        """\
        endpoints:
          one: {route: /x, backend: b}
          two: {route: /y, backend: b}
          three: {route: /y, backend: b}
        """,
        deployed,
    )
    assert len(found) == 2
    assert found[0].startswith("line 2: endpoint 'one' has the route of endpoint 'old'")
    assert found[1].startswith("line 4: endpoint 'three' has the route of endpoint 'two'")
    assert mistakes("endpoints:\n  old: {route: /x, backend: b}\n", deployed) == []


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
