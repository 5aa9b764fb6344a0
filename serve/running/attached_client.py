"""The client that a reload gives to the new version of a script: it replaces the backends of the previous one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...broker.errors import ConfigError
from ...broker.registry.records import EndpointRecord
from ...handles import background_loop
from .. import registry_changes
from ..client import Client, Target
from ..config import BackendConfig
from ..instance import Instance
from ..start_arguments import StartArguments


class AttachedClient(Client):
    """A client of a running instance in which creating a backend or an endpoint replaces one of the same name.

    A backend that exists serves until the replicas of the new code are ready, and stays if these cannot start. `finish`
    deletes what the script has not made again. `wait` returns at once, and `shutdown` only disconnects.
    """

    def __init__(self, core: Instance, http_url: str | None) -> None:
        super().__init__(core, http_url, owns=False, keep=True)
        self._backends: set[str] = set()
        self._endpoints: set[str] = set()

    @classmethod
    def attach(cls, redis_url: str, instance: str) -> AttachedClient:
        """Connect to a running instance."""
        core = background_loop.run(Instance(redis_url, instance).open())
        return cls(core, background_loop.run(core.http_url()))

    def started(self, arguments: StartArguments) -> Client:
        """Return this client in place of ``serve.start``. Raises `ConfigError` for another instance."""
        if arguments.instance != self.instance:
            raise ConfigError(
                f"penstock run reloads one instance, {self.instance!r}, and the script starts {arguments.instance!r}"
            )
        return self

    def create_backend(
        self,
        tag: str,
        func_or_class: Target,
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        **init_kwargs: Any,
    ) -> None:
        """`Client.create_backend`, or `Client.update_backend` with all fields if an earlier version made it."""
        make = super().create_backend
        if tag not in self._backends and tag in self.list_backends():
            config = BackendConfig.parse(config).model_dump()
            ray_actor_options, runtime_env = ray_actor_options or {}, runtime_env or {}
            make = super().update_backend
        make(
            tag,
            func_or_class,
            *init_args,
            config=config,
            ray_actor_options=ray_actor_options,
            runtime_env=runtime_env,
            **init_kwargs,
        )
        self._backends.add(tag)

    def _put_endpoint(self, new: EndpointRecord) -> None:
        made = frozenset(self._endpoints)
        self._run(self._core.change(lambda snapshot: registry_changes.replace_endpoint(snapshot, new, made)))
        self._endpoints.add(new.name)

    def finish(self) -> None:
        """Delete the endpoints and backends that this client has not made, and disconnect."""
        for name in set(self.list_endpoints()) - self._endpoints:
            self.delete_endpoint(name)
        for tag in set(self.list_backends()) - self._backends:
            self.delete_backend(tag)
        super().close()

    def wait(self) -> None:
        """Return at once: the process that runs the instance waits."""

    def shutdown(self) -> None:
        """Do nothing: the instance serves on."""

    def close(self) -> None:
        """Do nothing yet: `finish` follows the script, which may end with this call."""
