"""Options and error messages that the commands share."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ...broker.defaults import DEFAULT_INSTANCE, INSTANCE
from ...broker.errors import ConfigError
from ...broker.transport.dial import check_listens
from ...broker.transport.url import REDIS_URL
from ...broker.wire import exact_json
from ...handles import connect as connect_thin
from ...handles.connection import Connection
from ...handles.errors import BackendNotFound, EndpointNotFound
from ...handles.replies.response import Response
from .exits import USAGE, slow_imports

if TYPE_CHECKING:
    from ..client import Client

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def which_instance(command: FunctionT) -> FunctionT:
    """Add the options --redis-url and --instance to a command."""
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
        help="The broker of the instance: redis://, rediss://, unix:// or redis+sentinel://.",
    )(command)


def as_json(command: FunctionT) -> FunctionT:
    return click.option("--json", "json", is_flag=True, help="Write JSON, for scripts.")(command)


class Wrong(click.ClickException):
    """An error in the arguments, or a name that does not exist: nothing was done."""

    exit_code = USAGE


def wrong(message: object) -> NoReturn:
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    raise Wrong(str(message))


def check_text(**arguments: str | None) -> None:
    """Refuse arguments that are not UTF-8, which Python decodes to lone surrogates."""
    for name, value in arguments.items():
        if value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                wrong(f"{name.upper()} is not UTF-8: {os.fsencode(value)!r}")


@contextmanager
def usage_errors() -> Generator[None]:
    """Raise errors about wrong names and values as `Wrong`, with its exit code."""
    try:
        yield
    except (ConfigError, EndpointNotFound, BackendNotFound, TypeError) as e:
        wrong(e)


def thin_connection(redis_url: str | None, instance: str) -> Connection:
    """Return a connection that needs only Redis."""
    with usage_errors():
        return connect_thin(known_url(redis_url), instance)


def known_url(redis_url: str | None) -> str:
    """Return the URL of a broker that accepts connections. Raises what `check_listens` raises."""
    if redis_url is None:
        wrong(f"the broker is not known: give --redis-url, or set {REDIS_URL}")
    check_listens(redis_url)
    return redis_url


def client_of(redis_url: str | None, instance: str) -> Client:
    """Return a client of a running instance."""
    with slow_imports():  # pydantic and Starlette take half a second: not for --help.
        from ..lifecycle import connect

    with usage_errors():
        return connect(known_url(redis_url), instance)


def write_json(value: Any) -> None:
    """Write one line of JSON. Raises TypeError for a value that JSON cannot represent."""
    click.echo(exact_json.dumps(value))


def error_of(error: BaseException) -> dict[str, Any]:
    """Return an error for JSON output. The type of a `BackendError` is the one that user code raised."""
    return {
        "type": getattr(error, "type_name", type(error).__name__),
        "message": getattr(error, "message", None) or str(error),
    }


def result_line(value: Any) -> dict[str, Any]:
    """Return a result for JSON output: bytes as text, or as marked base64 if they are not text."""
    if isinstance(value, Response):
        value = value.body
    if isinstance(value, bytes):
        try:
            return {"result": value.decode()}
        except UnicodeDecodeError:
            return {"result": b64encode(value).decode(), "encoding": "base64"}
    return {"result": value}
