"""Manifests for tests."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

from penstock.broker.registry.records import BackendRecord, Snapshot
from penstock.serve.config import BackendConfig
from penstock.serve.deploy.manifest import Manifest, read

NOTHING = Snapshot()


def manifest(text: str, deployed: Snapshot = NOTHING) -> Manifest:
    """Return the manifest in ``text``, which has no mistakes."""
    declared, mistakes = read(dedent(text), deployed)
    assert mistakes == []
    return declared


def mistakes(text: str, deployed: Snapshot = NOTHING) -> list[str]:
    return [str(mistake) for mistake in read(dedent(text), deployed)[1]]


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


def backend_record(tag: str, **config: Any) -> BackendRecord:
    return BackendRecord(tag=tag, version="1", code=tag, config=BackendConfig(**config).spec())
