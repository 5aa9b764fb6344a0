"""``penstock call``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ...handles.codec import load_json
from ...handles.errors import BackendError, MalformedBody, PenstockError
from ...handles.files.csv_rows import is_text
from ...handles.replies.response import Response
from .exits import FAILED
from .options import (
    as_json,
    check_text,
    error_of,
    result_line,
    thin_connection,
    usage_errors,
    which_instance,
    write_json,
    wrong,
)


@click.command()
@click.argument("endpoint")
@click.argument("data", required=False)
@which_instance
@click.option("--text", is_flag=True, help="Send DATA as text instead of JSON.")
@click.option(
    "--query", multiple=True, metavar="NAME=VALUE", help="A query parameter (request.query_params). Can be repeated."
)
@click.option("--method", default="__call__", metavar="NAME", help="The method of the backend's class.")
@click.option("--shard-key", metavar="KEY", help="Calls with the same key go to the same backend.")
@click.option("--model-id", metavar="ID", help="The model that the request names, for code that loads several.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Give up after this long.")
@click.option("--stream", is_flag=True, help="Write each value that the code yields as it arrives.")
@click.option("--submit", is_flag=True, help="Submit the call, and write the id of its result instead of waiting.")
@click.option(
    "--idempotency-key", metavar="KEY", help="Calls with the same key run once and get the one result, for a time."
)
@as_json
def call(
    endpoint: str,
    data: str | None,
    redis_url: str | None,
    instance: str,
    text: bool,
    query: tuple[str, ...],
    method: str,
    shard_key: str | None,
    model_id: str | None,
    timeout: float | None,
    stream: bool,
    submit: bool,
    idempotency_key: str | None,
    json: bool,
) -> None:
    """Call ENDPOINT once with DATA, and write the result.

    DATA is JSON; "-" reads it from standard input. Text and bytes are written unchanged, other values as JSON. With
    --stream, text and bytes follow one another as they are, and any other value is a line; with --json each is a line.

    \b
    Examples:
      penstock call greet '{"name": "Ada"}'
      penstock call greet Ada --text
      penstock call digit - < image.json
      penstock call tell '"a story"' --stream
      penstock result $(penstock call digit --submit - < image.json) --wait
    """  # noqa: D301
    check_text(endpoint=endpoint, data=data, method=method, shard_key=shard_key, idempotency_key=idempotency_key)
    check_text(model_id=model_id)
    for one in query:
        check_text(query=one)
    if stream and submit:
        wrong("--stream waits for the values, and --submit does not: `penstock result` fetches them later")
    body = _body(data, text)
    parameters = dict(_pair(one) for one in query)
    with thin_connection(redis_url, instance) as connection:
        with usage_errors():
            handle = connection.get_handle(endpoint).options(
                method_name=method,
                shard_key=shard_key,
                timeout_s=timeout,
                idempotency_key=idempotency_key,
                model_id=model_id,
            )
        arguments = () if data is None else (body,)
        try:
            if stream:
                with usage_errors():
                    streaming = handle.options(stream=True)
                with streaming.remote(*arguments, **parameters) as values:
                    for value in values:
                        _write_part(value, json)
                return
            if submit:
                submitted = handle.submit(*arguments, **parameters)
                if json:
                    write_json({"id": submitted.id})
                else:
                    click.echo(submitted.id)
                return
            future = handle.remote(*arguments, **parameters)
            try:
                answer = future.result()
            except (KeyboardInterrupt, SystemExit):
                future.cancel()
                raise
        except PenstockError as e:
            report_error(e, json)
            sys.exit(FAILED)
    write_answer(answer, json)


def report_error(error: PenstockError, json: bool) -> None:
    """Write the error that a call ended with."""
    if json:
        write_json({"error": error_of(error)})
    else:
        said = f"{error.type_name}: {error.message}" if isinstance(error, BackendError) else str(error)
        click.echo(f"Error: {said}", err=True)


def _body(data: str | None, text: bool) -> Any:
    if data is None:
        return None
    raw = sys.stdin.buffer.read() if data == "-" else data.encode()
    try:
        if text:
            return raw.decode()
        return load_json(raw, "DATA")
    except UnicodeDecodeError as e:
        wrong(f"DATA is not UTF-8: {e}")
    except MalformedBody as e:
        wrong(f"{e}; --text sends it as text")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        wrong(f"--query is NAME=VALUE, not {text!r}")
    return name, value


def _write_part(value: Any, json: bool) -> None:
    """Write one value of a stream. A reader sees it at once, also behind a pipe."""
    if isinstance(value, bytes | str) and not json:
        click.echo(value, nl=False)
    else:
        write_answer(value, json)


def write_answer(answer: Any, json: bool) -> None:
    """Write the result of a call."""
    try:
        if json:
            write_json(result_line(answer))
            return
        if isinstance(answer, Response):
            answer = answer.body
        if isinstance(answer, bytes):
            click.echo(answer, nl=False)
        elif isinstance(answer, str) and is_text(answer):
            click.echo(answer)
        elif answer is not None:
            write_json(answer)
    except TypeError as e:
        click.echo(f"Error: the result cannot be written as JSON: {e}", err=True)
        sys.exit(FAILED)
