"""``penstock start`` and ``penstock shutdown``."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import click
import ray

from ...broker.defaults import PROXY_REDIS_URL, REPLICA_REDIS_URL
from ...broker.transport.url import REDIS_URL
from ..lifecycle import join_lasting_ray, start as start_instance
from .connecting import client_of
from .options import as_json, door_to, telling_what_is_wrong, which_instance, write_json, wrong


@click.command()
@which_instance
@click.option("--http-host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where HTTP is served.")
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option(
    "--location",
    type=click.Choice(["HeadOnly", "EveryNode", "NoServer"]),
    default="HeadOnly",
    show_default=True,
    help="Which nodes of the Ray cluster serve HTTP.",
)
@click.option(
    "--replica-redis-url",
    envvar=REPLICA_REDIS_URL,
    show_envvar=True,
    metavar="URL",
    help="The broker as replicas reach it, with a user of their own.",
)
@click.option(
    "--proxy-redis-url",
    envvar=PROXY_REDIS_URL,
    show_envvar=True,
    metavar="URL",
    help="The broker as proxies reach it.",
)
@as_json
def start(
    redis_url: str | None,
    instance: str,
    http_host: str,
    http_port: int,
    location: str,
    replica_redis_url: str | None,
    proxy_redis_url: str | None,
    json: bool,
) -> None:
    """Start an instance that outlives this command.

    It runs on the Ray cluster that RAY_ADDRESS names, or that `ray start` has begun on this machine; if there is none,
    one is begun here. The broker must run already: Redis 7.0 or newer, or Valkey 8 or newer.

    \b
    Examples:
      penstock start --redis-url redis://localhost:6379
      penstock start --http-host 0.0.0.0 --http-port 80 --location EveryNode
    """  # noqa: D301
    if redis_url is None:
        wrong(f"an instance that outlives this command needs a broker that does: give --redis-url, or set {REDIS_URL}")
    with door_to(redis_url, instance):
        pass  # a broker that cannot be reached is told of before Ray is started for nothing
    began_ray = _join_ray()
    with telling_what_is_wrong():
        client = start_instance(
            redis_url=redis_url,
            instance=instance,
            detached=True,
            http_options={"host": http_host, "port": http_port, "location": location},
            replica_redis_url=replica_redis_url,
            proxy_redis_url=proxy_redis_url,
        )
    if json:
        write_json({"instance": instance, "http_url": client.http_url, "started_ray": began_ray})
        return
    click.echo(f"instance {instance!r} serves" + (f" on {client.http_url}" if client.http_url else ", without HTTP"))


@click.command()
@which_instance
@click.option("--yes", is_flag=True, help="Do not ask.")
def shutdown(redis_url: str | None, instance: str, yes: bool) -> None:
    """End an instance, and delete all that it has in its broker.

    Requests that are still queued are refused. Backends, endpoints, dead letters and the results of batch jobs are
    deleted. Ray goes on, also if it was started for the instance: `ray stop` ends it.
    """
    with client_of(redis_url, instance) as client:
        if not yes:
            queued = sum(backend["queued"] for backend in client.status()["backends"].values())
            has = f"{len(client.list_backends())} backends, {queued} requests queued"
            if not _confirmed(f"End the instance {instance!r} ({has})?"):
                wrong(f"the instance {instance!r} goes on")
        client.shutdown()
    click.echo(f"instance {instance!r} has ended")


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        wrong("nobody is there to say yes: give --yes")


def _join_ray() -> bool:
    """Connect to a Ray cluster; tell whether it had to be started."""
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **options)
        except ConnectionError as e:
            hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it wants a token, set RAY_AUTH_MODE=token"
            wrong(f"the Ray cluster at {address} (RAY_ADDRESS) cannot be reached: {e}{hint}")
        return False
    if join_lasting_ray(**options):
        return False
    # The port that Ray takes by itself is that of Redis. Said before, so that it is known whatever becomes of this.
    click.echo("no Ray cluster was started on this machine: starting one; `ray stop` ends it", err=True)
    ran = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--include-dashboard=false"],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise click.ClickException(f"cannot start Ray on this machine:\n{ran.stderr.strip()}")
    return join_lasting_ray(**options)
