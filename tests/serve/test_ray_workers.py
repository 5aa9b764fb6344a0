"""Ray's workers as forks: each is the process that Ray knows, and differs from the others where Python's would."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from tests.support.ray_workers import forks_with_ray
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="workers are forks on Linux only")


class Reporter:
    """Reports its process."""

    def identity(self) -> tuple[int, int]:
        return os.getpid(), os.getppid()

    def random_id(self) -> str:
        return str(ray.ObjectID.from_random().hex())

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


def reporters(count: int, **options: Any) -> list[Any]:
    actor_class: Any = ray.remote(Reporter)
    return [actor_class.options(num_cpus=0.1, **options).remote() for _ in range(count)]


def results(refs: list[Any]) -> list[Any]:
    return ray.get(refs, timeout=60)


def test_actors_are_forks_of_one_process_with_random_ids_of_their_own(cluster: str) -> None:
    actors = reporters(3)
    found = results([actor.identity.remote() for actor in actors])
    assert len({pid for pid, _ in found}) == 3
    [parent] = {parent for _, parent in found}
    assert "ray_workers" in Path(f"/proc/{parent}/cmdline").read_text()
    assert len(set(results([actor.random_id.remote() for actor in actors for _ in range(2)]))) == 6


def test_an_actor_is_dead_when_its_process_was_killed(cluster: str) -> None:
    [actor] = reporters(1)
    [(pid, _)] = results([actor.identity.remote()])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        results([actor.identity.remote()])
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_killed_actor_has_no_process(cluster: str) -> None:
    [actor] = reporters(1)
    [(pid, _)] = results([actor.identity.remote()])
    ray.kill(actor)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_variables_of_a_runtime_env_belong_to_its_actors_alone(cluster: str) -> None:
    actors = [*reporters(1), *reporters(1, runtime_env={"env_vars": {"FORKED": "1"}})]
    assert results([actor.variable.remote("FORKED") for actor in actors]) == [None, "1"]
    found = results([actor.identity.remote() for actor in actors])
    assert len({parent for _, parent in found}) == 2  # Ray and Penstock read variables when they are imported


JOB = """
import os
import ray

class Reporter:
    def identity(self):
        return ray.get_runtime_context().get_job_id(), os.getppid()

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
actor = ray.remote(Reporter).options(num_cpus=0.1).remote()
print(ray.get_runtime_context().get_job_id(), *ray.get(actor.identity.remote(), timeout=60))
"""


def test_actors_of_another_job_are_forks_of_the_same_process_and_belong_to_their_job(cluster: str) -> None:
    [actor] = reporters(1)
    [(_, parent)] = results([actor.identity.remote()])
    environ = {**os.environ, "RAY_ADDRESS": cluster}
    printed = subprocess.check_output([forks_with_ray().python, "-c", JOB], text=True, env=environ, timeout=90)
    job, job_of_actor, parent_of_actor = printed.split()
    assert job == job_of_actor != ray.get_runtime_context().get_job_id()
    assert int(parent_of_actor) == parent
