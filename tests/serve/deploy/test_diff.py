"""The difference between a manifest and what is deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from penstock.broker.registry.records import BackendRecord, Snapshot
from penstock.serve.deploy.diff import ManifestChange, diff
from penstock.serve.deploy.manifest import Manifest
from penstock.serve.deploy.sources import LocalCode, Source
from penstock.workers.executing.user_code import dump
from tests.serve.deploy.manifests import NOTHING, WHOLE, manifest


def deploy(declared: Manifest) -> tuple[Snapshot, dict[str, bytes]]:
    """Return the records and the code after ``declared`` was deployed."""
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
        tag: dump(backend.deployable, backend.args, backend.kwargs) + b"1" for tag, backend in declared.backends.items()
    }
    return Snapshot(1, backends, declared.endpoints), codes


def test_a_second_deployment_changes_nothing() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    assert diff(manifest(WHOLE, deployed), deployed, codes) == []


def test_each_difference_makes_the_smallest_change() -> None:
    deployed, codes = deploy(manifest(WHOLE))

    def changes(old: str, new: str) -> list[tuple[str, str, str]]:
        assert old in WHOLE
        return [(s.verb, s.kind, s.name) for s in diff(manifest(WHOLE.replace(old, new), deployed), deployed, codes)]

    assert changes("num_replicas: 2", "num_replicas: 3") == [("configure", "backend", "digits")]
    assert changes("models.digits:Digits", "models.digits:Other") == [("update", "backend", "digits")]
    assert changes("args: [0.5,", "args: [0.6,") == [("update", "backend", "digits")]
    assert changes("num_cpus: 0.5", "num_cpus: 1") == [("update", "backend", "digits")]
    assert changes("digits: 0.9, next: 0.1", "digits: 0.8, next: 0.2") == [("update", "endpoint", "digit")]
    assert changes("      plain:\n        backend: next\n", "") == []


def test_code_that_is_not_a_plain_value_is_replaced_and_not_run() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    codes["next"] = dump(print, (), {})
    (change,) = diff(manifest(WHOLE, deployed), deployed, codes)
    assert (change.verb, change.name) == ("update", "next")


def test_changed_code_of_this_machine_replaces_the_replicas() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    edited = {"next": LocalCode("models.digits", Source(Path("models"), "new"), (), "")}
    known = replace(deployed, backends={**deployed.backends, "next": replace(deployed.backends["next"], source="old")})
    assert [str(change) for change in diff(manifest(WHOLE), known, codes, local=edited)] == [
        "update backend next: source of models.digits"
    ]


def test_a_restart_replaces_the_replicas_although_nothing_has_changed() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    changes = diff(manifest(WHOLE), deployed, codes, restart=["next"])
    assert [str(change) for change in changes] == ["update backend next: restart"]


def test_an_application_is_deployed_once_and_its_changes_are_described() -> None:
    text = "backends:\n  api:\n    asgi: web.api:app\n"
    deployed, codes = deploy(manifest(text))
    assert diff(manifest(text, deployed), deployed, codes) == []

    def changes(new: str) -> list[str]:
        changed = manifest(text.replace("asgi: web.api:app", new), deployed)
        return [str(change) for change in diff(changed, deployed, codes)]

    assert changes("asgi: web.api:other") == ["update backend api: asgi 'web.api:app' -> 'web.api:other'"]
    assert changes("import: web.api:f") == ["update backend api: asgi 'web.api:app' -> import 'web.api:f'"]
    assert [str(change) for change in diff(manifest(text), NOTHING, {})] == [
        "create backend api: web.api:app, 1 replica"
    ]


def test_only_pruning_deletes_and_endpoints_first() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    assert diff(Manifest({}, {}), deployed, codes) == []
    assert diff(Manifest({}, {}), deployed, codes, prune=True) == [
        ManifestChange("delete", "endpoint", "digit"),
        ManifestChange("delete", "endpoint", "plain"),
        ManifestChange("delete", "backend", "digits"),
        ManifestChange("delete", "backend", "next"),
    ]


def test_changes_describe_the_difference() -> None:
    deployed, codes = deploy(manifest(WHOLE))
    changed = manifest(WHOLE.replace("num_replicas: 2", "num_replicas: 3"), deployed)
    assert [str(change) for change in diff(changed, deployed, codes)] == [
        "configure backend digits: num_replicas 2 -> 3"
    ]
    assert [str(change) for change in diff(manifest(WHOLE), NOTHING, {})] == [
        "create backend digits: models.digits:Digits, 2 replicas",
        "create backend next: models.digits:Next, 1 replica",
        "create endpoint digit: POST /digit/{n:int}",
        "create endpoint plain: for handles only",
    ]
