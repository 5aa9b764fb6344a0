"""Code that a test names by its import path."""

from typing import Any

from penstock import serve


def echo(request: serve.Request) -> Any:
    return request.data
