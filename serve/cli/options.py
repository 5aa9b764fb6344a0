"""Options and messages that the commands share."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click

from ...broker.defaults import DEFAULT_INSTANCE, INSTANCE
from ...broker.errors import ConfigError
from ...broker.transport.url import REDIS_URL
from ...broker.wire import exact_json
from ...handles import connect as connect_thin
from ...handles.connection import Connection
from ...handles.errors import BackendNotFound, EndpointNotFound
from ...handles.response import Response
from .exits import USAGE

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def which_instance(command: FunctionT) -> FunctionT:
    """Give a command the options that say which instance it is about."""
    command = click.option(
        "--instance",
        envvar=INSTANCE,
        show_envvar=True,
        default=DEFAULT_INSTANCE,
        show_default=True,
        help="The name of the instance.",
        metavar="NAME",
    )(command)
    return click.option(
        "--redis-url",
        envvar=REDIS_URL,
        show_envvar=True,
        metavar="URL",
        help="The instance's broker: redis://, rediss:// or unix://.",
    )(command)


def as_json(command: FunctionT) -> FunctionT:
    return click.option("--json", "json", is_flag=True, help="Write JSON, for scripts.")(command)


class Wrong(click.ClickException):
    """What was asked cannot be, and nothing was done."""

    exit_code = USAGE


def wrong(message: object) -> NoReturn:
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    raise Wrong(str(message))


def check_text(**arguments: str | None) -> None:
    """Refuse arguments that are not UTF-8, which Python gives as lone surrogates."""
    for name, value in arguments.items():
        if value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                wrong(f"{name.upper()} is not UTF-8: {os.fsencode(value)!r}")


@contextmanager
def telling_what_is_wrong() -> Generator[None]:
    """Turn the errors of wrong names and values into those of a wrong command line."""
    try:
        yield
    except (ConfigError, EndpointNotFound, BackendNotFound, TypeError) as e:
        wrong(e)


def door_to(redis_url: str | None, instance: str) -> Connection:
    """Return what needs nothing but Redis."""
    if redis_url is None:
        wrong(f"which broker? Give --redis-url, or set {REDIS_URL}")
    with telling_what_is_wrong():
        return connect_thin(redis_url, instance)


def write_json(value: Any) -> None:
    """Write one line. Raises ``TypeError`` for what JSON cannot hold."""
    click.echo(exact_json.dumps(value))


def error_of(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON has it: of a backend's, the type that its code raised."""
    return {
        "type": getattr(error, "type_name", type(error).__name__),
        "message": getattr(error, "message", None) or str(error),
    }


def result_line(value: Any) -> dict[str, Any]:
    """Return a result as a line of JSON has it: bytes as text, or in base64 and marked where they are no text."""
    if isinstance(value, Response):
        value = value.body
    if isinstance(value, bytes):
        try:
            return {"result": value.decode()}
        except UnicodeDecodeError:
            return {"result": b64encode(value).decode(), "encoding": "base64"}
    return {"result": value}
