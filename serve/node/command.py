"""``penstock node``."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import click

from ..cli.exits import FAILED, INTERRUPTED, TERMINATED, slow_imports
from ..cli.options import wrong

_POLL_S = 1.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--drain-timeout",
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    help="The longest drain after SIGTERM. Less than the time after which the node is killed.",
)
@click.option(
    "--nice",
    default=0,
    show_default=True,
    envvar="RAY_worker_niceness",
    show_envvar=True,
    type=click.IntRange(0, 19),
    help="The niceness of replicas and proxies. Ray's own default is 15.",
)
@click.option(
    "--on-ready",
    metavar="COMMAND",
    help="A shell command to run once Ray runs here, with RAY_ADDRESS set. If it fails, the node ends.",
)
@click.argument("ray_options", nargs=-1, type=click.UNPROCESSED, metavar="[RAY START OPTIONS]...")
def node(drain_timeout: float, nice: int, on_ready: str | None, ray_options: tuple[str, ...]) -> None:
    """Run a node of a Ray cluster until SIGTERM, then drain it and end.

    All other options are those of `ray start`. On SIGTERM or an interruption, replicas start on other nodes, proxies
    fail their readiness, both finish what they hold, and then Ray ends. A second signal ends Ray at once.

    \b
    Exit codes: 0 drained; 1 Ray ended by itself, or the drain timed out; 130, 143 cut short by a second signal.

    \b
    Examples:
      penstock node --head --port=6379 --num-cpus=0 --on-ready 'penstock start --if-needed'
      penstock node --address=10.0.0.4:6379 --drain-timeout 300
    """  # noqa: D301 - click reads \b as: do not wrap what follows
    names = {option.partition("=")[0] for option in ray_options}
    if not names & {"--head", "--address"}:
        wrong("give --head for the first node of a cluster, or --address HOST:PORT of the head to join one")
    if "--block" in names:
        wrong("leave out --block: `penstock node` always blocks")
    with slow_imports():  # Ray takes a second: not for --help.
        from .draining import Outcome, drain, report
        from .ray_node import RayNode

    ending, hurry = threading.Event(), threading.Event()
    signals: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        (hurry if ending.is_set() else ending).set()
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    running = RayNode(ray_options, nice)
    try:
        while not ending.wait(_POLL_S):
            if running.has_ended():
                report("Ray has ended by itself; its output and its logs have the reason")
                raise click.exceptions.Exit(FAILED)
            if on_ready is not None and running.raylet() is not None:
                running.run(on_ready)
                on_ready = None
            if failure := running.run_failure():
                report(failure)
                raise click.exceptions.Exit(FAILED)
        outcome = drain(running, drain_timeout, hurry)
    finally:
        running.end()
    report(f"the node has ended: {outcome.value}")
    if outcome is Outcome.TIMED_OUT:
        raise click.exceptions.Exit(FAILED)
    if outcome is Outcome.CUT_SHORT:
        raise click.exceptions.Exit(INTERRUPTED if signals[-1] == signal.SIGINT else TERMINATED)
