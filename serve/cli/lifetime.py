"""``penstock start`` and ``penstock shutdown``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ...broker.defaults import ADMIN_TOKEN, PROXY_REDIS_URL, REPLICA_REDIS_URL
from ...broker.transport.url import REDIS_URL
from ..status.status import plural
from .exits import slow_imports
from .options import as_json, client_of, usage_errors, which_instance, write_json, wrong


@click.command()
@which_instance
@click.option(
    "--http-host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address that HTTP is served on."
)
@click.option(
    "--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="The port; 0 picks a free one."
)
@click.option(
    "--location",
    type=click.Choice(["HeadOnly", "EveryNode", "NoServer"]),
    default="HeadOnly",
    show_default=True,
    help="Which nodes of the Ray cluster serve HTTP.",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="The port of metrics, routes and the dashboard; 0 picks a free one. By default there is no dashboard.",
)
@click.option(
    "--admin-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="The address of the admin port.",
)
@click.option(
    "--admin-token",
    metavar="TOKEN",
    help=f"The token with which the dashboard replays and drops dead letters, or 'sha256:' and its digest. "
    f"{ADMIN_TOKEN} in the environment is the same, and process lists do not show that.",
)
@click.option("--access-log", is_flag=True, help="Let the proxies log a line for each request.")
@click.option(
    "--replica-redis-url",
    envvar=REPLICA_REDIS_URL,
    show_envvar=True,
    metavar="URL",
    help="The broker's URL for replicas, such as with a user of their own.",
)
@click.option(
    "--proxy-redis-url",
    envvar=PROXY_REDIS_URL,
    show_envvar=True,
    metavar="URL",
    help="The broker's URL for proxies.",
)
@click.option(
    "--if-needed", is_flag=True, help="Succeed if the instance is already running; its options stay as they are."
)
@as_json
def start(
    redis_url: str | None,
    instance: str,
    http_host: str,
    http_port: int,
    location: str,
    admin_port: int | None,
    admin_host: str,
    admin_token: str | None,
    access_log: bool,
    replica_redis_url: str | None,
    proxy_redis_url: str | None,
    if_needed: bool,
    json: bool,
) -> None:
    """Start an instance that outlives this command.

    It runs on the Ray cluster of RAY_ADDRESS, or on the one that `ray start` has started on this machine; if there is
    none, this command starts one. The broker must be running: Redis 7.0 or newer, or Valkey 8 or newer.

    \b
    Examples:
      penstock start --redis-url redis://localhost:6379
      penstock start --http-host 0.0.0.0 --http-port 80 --location EveryNode
      penstock start --if-needed && penstock deploy app.yaml
    """  # noqa: D301
    if redis_url is None:
        wrong(f"the instance needs a broker that outlives this command: give --redis-url, or set {REDIS_URL}")
    with slow_imports():  # pydantic and Starlette take half a second: not for --help.
        from ..instance import AlreadyRunning
        from ..lifecycle import check_start, connect, start as start_instance
        from ..start_arguments import StartArguments

    options: dict[str, Any] = {
        "redis_url": redis_url,
        "instance": instance,
        "detached": True,
        "http_options": {
            "host": http_host,
            "port": http_port,
            "location": location,
            "admin_port": admin_port,
            "admin_host": admin_host,
            "admin_token": admin_token,
            "access_log": access_log,
        },
        "replica_redis_url": replica_redis_url,
        "proxy_redis_url": proxy_redis_url,
    }
    started_ray, started = False, True
    with usage_errors():
        try:
            check_start(StartArguments.checked(**options, data_dir=None, max_memory_bytes=None))
            with slow_imports():  # Ray takes a second: not for a wrong argument.
                from ..ray_cluster import join_or_start_lasting_ray
            started_ray = join_or_start_lasting_ray()
            client = start_instance(**options)
        except AlreadyRunning:
            if not if_needed:
                raise
            client, started = connect(redis_url, instance), False
    if json:
        write_json({"instance": instance, "http_url": client.http_url, "started_ray": started_ray, "started": started})
        return
    serves = "serves" if started else "is already running, and serves"
    click.echo(f"instance {instance!r} {serves}" + (f" on {client.http_url}" if client.http_url else ", without HTTP"))


@click.command()
@which_instance
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def shutdown(redis_url: str | None, instance: str, yes: bool) -> None:
    """End an instance, and delete all its data in the broker.

    Requests that are still queued are refused. Backends, endpoints, dead letters and the results of batch jobs are
    deleted. Ray continues to run, also if `penstock start` started it: `ray stop` ends it.
    """
    with client_of(redis_url, instance) as client:
        if not yes:
            queued = sum(backend["queued"] for backend in client.status()["backends"].values())
            content = f"{plural(len(client.list_backends()), 'backend')}, {plural(queued, 'queued request')}"
            if not _confirmed(f"End the instance {instance!r} ({content})?"):
                wrong(f"the instance {instance!r} continues to run")
        client.shutdown()
    click.echo(f"instance {instance!r} has ended")


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        wrong("standard input has no answer to the confirmation: give --yes")
