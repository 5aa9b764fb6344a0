"""``penstock result``, ``cancel`` and ``requests``: requests that were submitted earlier."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from typing import Any

import click

from ...broker.wire import exact_json
from ...handles import RequestStatus
from ...handles.errors import PenstockError, RequestNotFound
from ..status.status import table
from .call import report_error, write_answer
from .exits import FAILED
from .options import as_json, check_text, thin_connection, usage_errors, which_instance, write_json, wrong

_SHOWN_PROGRESS = 40
"""Characters of a progress that the list shows."""


_FOREVER = float("inf")


class _SecondsOrId(click.FloatRange):
    """Seconds, or the ID that follows ``--wait`` without SECONDS."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            float(value)
        except ValueError:
            return value
        return super().convert(value, param, ctx)


@click.command()
@click.argument("id", required=False, metavar="ID")
@which_instance
@click.option(
    "--wait",
    is_flag=False,
    flag_value=_FOREVER,
    default=0.0,
    type=_SecondsOrId(0),
    metavar="[SECONDS]",
    help="Wait for the result, at most this long; without SECONDS, until there is one.",
)
@as_json
def result(id: str | None, redis_url: str | None, instance: str, wait: float | str, json: bool) -> None:  # noqa: A002
    """Write the result of the submitted request ID.

    \b
    Example:
      ID=$(penstock call transcribe '{"file": "talk.wav"}' --submit)
      penstock result $ID --wait
    """  # noqa: D301
    if isinstance(wait, str):
        if id is not None:
            raise click.BadParameter(f"{wait!r} is not a number of seconds", param_hint="'--wait'")
        id, wait = wait, _FOREVER  # noqa: A001
    if id is None:
        raise click.MissingParameter(param_hint="'ID'", param_type="argument")
    check_text(id=id)
    with thin_connection(redis_url, instance) as connection:
        submitted = connection.submitted(id)
        try:
            if not wait:
                status = submitted.status()
                if not status.is_final:
                    wrong(f"the request is {status.status} and has no result yet; --wait waits for it")
            answer = submitted.result(None if wait == _FOREVER else wait)
        except RequestNotFound as e:
            wrong(e)
        except PenstockError as e:
            report_error(e, json)
            sys.exit(FAILED)
    write_answer(answer, json)


@click.command()
@click.argument("id")
@which_instance
def cancel(id: str, redis_url: str | None, instance: str) -> None:  # noqa: A002
    """Cancel the submitted request ID, if it has not ended."""
    check_text(id=id)
    with thin_connection(redis_url, instance) as connection:
        submitted = connection.submitted(id)
        try:
            if submitted.cancel():
                click.echo("cancelled")
                return
            status = submitted.status()
        except RequestNotFound as e:
            wrong(e)
    click.echo(f"Error: the request has ended already: it is {status.status}", err=True)
    sys.exit(FAILED)


@click.command()
@click.argument("endpoint")
@which_instance
@as_json
def requests(endpoint: str, redis_url: str | None, instance: str, json: bool) -> None:
    """List the submitted requests of ENDPOINT and those with an idempotency key, oldest first.

    It scans all keys of the Redis, which needs the rights of the owner. An ID is the right to read the result.
    """
    check_text(endpoint=endpoint)
    with thin_connection(redis_url, instance) as connection, usage_errors():
        found = connection.submitted_requests(endpoint)
    if json:
        for status in found:
            write_json(status.to_dict())
    elif found:
        head = ("ID", "STATUS", "CREATED", "ATTEMPTS", "REPLICA", "PROGRESS")
        click.echo(table(head, [_row(status) for status in found]))
    else:
        click.echo(f"endpoint {endpoint!r} has no submitted requests")


def _row(status: RequestStatus) -> tuple[str, ...]:
    created = datetime.fromtimestamp(status.created, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    progress = "" if status.progress is None else exact_json.dumps(status.progress).decode(errors="replace")
    if status.error is not None:
        progress = f"{status.error.get('type')}: {status.error.get('message')}"
    progress = " ".join(progress.split())
    if len(progress) > _SHOWN_PROGRESS:
        progress = progress[: _SHOWN_PROGRESS - 1] + "…"
    return status.id, status.status, created, str(status.attempts), status.replica or "-", progress
