"""Every log line of a backend's code contains the id of its request."""

from __future__ import annotations

import logging
from typing import Any

import httpx

from penstock import serve
from penstock.runtime.logs import TEXT_FORMAT
from tests.serve.backends import SMALL


class Logs:
    """A backend that captures its own log lines and returns the format of its process."""

    def __call__(self, request: serve.Request) -> Any:
        heard: list[Any] = []
        listener = logging.Handler()
        listener.emit = lambda record: heard.append(record.__dict__["request_id"])  # type: ignore[method-assign]
        logger = logging.getLogger("user's")
        logger.addHandler(listener)
        logger.warning("hello")
        logger.removeHandler(listener)
        formatters = [handler.formatter for handler in logging.getLogger().handlers]
        is_shown = logging.getLogger("user's").isEnabledFor(logging.INFO)
        return heard, [formatter._fmt for formatter in formatters if formatter], is_shown


def test_a_log_line_of_a_backend_has_the_id_of_its_request(web: serve.Client) -> None:
    web.create_backend("logs", Logs, ray_actor_options=SMALL)
    web.create_endpoint("logs", backend="logs", route="/logs")
    heard, formats, info_is_shown = httpx.get(
        f"{web.http_url}/logs", headers={"x-request-id": "from the client"}
    ).json()
    assert heard == ["from the client"]
    assert TEXT_FORMAT in formats
    assert info_is_shown
