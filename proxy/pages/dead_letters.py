"""Dead letters at the admin port: a list for each backend, and, for who has the admin token, replay and drop.

The token is expected in the ``Authorization`` header alone. A page of another site cannot make a browser send that, so
it cannot replay or drop anything in the name of a person who has the dashboard open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import Scope

from ...broker.queue.dead_letters import DeadLetter
from ...handles.calls.request_client import RequestClient
from ...handles.dead_letters import drop_letter, replay_letter
from ...handles.errors import BackendNotFound, ConfigError, NotPermitted, PenstockError, WireError
from .. import responses
from ..responses import HTTPResponse
from .admin_token import is_token

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0

MOST_SHOWN = 50
"""The number of dead letters of a backend that are listed, the newest ones."""

_WORK = {"replay": replay_letter, "drop": drop_letter}
_DONE = {"replay": "replayed", "drop": "dropped"}


class DeadLetterPages:
    """The pages of the dead letters of one proxy's instance.

    Args:
        caller: the client by which the proxy publishes.
        token: the digest of the admin token; None if there is none, so that nothing can be changed.
    """

    def __init__(self, caller: RequestClient, token: str | None) -> None:
        self._caller, self._token = caller, token

    @property
    def can_change(self) -> bool:
        """Whether there is a token by which dead letters are replayed and dropped."""
        return self._token is not None

    async def respond(self, scope: Scope, name: str) -> HTTPResponse:
        """Return the response to a request for the list (an empty ``name``), or for ``replay`` or ``drop``."""
        method, path = scope["method"], scope["path"]
        if name and name not in _WORK:
            return responses.of_status(404, f"no page {path!r}; there are replay and drop")
        allowed = ("POST",) if name else ("GET", "HEAD")
        if method not in allowed:
            return responses.not_allowed(method, path, allowed)
        if name and (refusal := self._refusal(scope)) is not None:
            return refusal
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        try:
            return await asyncio.wait_for(self._work(name, query), _TIMEOUT_S)
        except asyncio.TimeoutError:
            return responses.of_status(504, f"no response from the broker within {_TIMEOUT_S:g} s")
        except NotPermitted as e:
            log.warning("the dead letters of backend %r: %s", query.get("backend"), e)
            return responses.of_status(
                403, "the Redis user of the proxies lacks a permission for this: see the page on security"
            )
        except PenstockError as e:
            if type(e) in (PenstockError, WireError):  # the letter is gone, or cannot be replayed
                return responses.of_status(409, str(e))
            return responses.of_error(e, debug=False)

    def _refusal(self, scope: Scope) -> HTTPResponse | None:
        if self._token is None:
            return responses.of_status(
                403,
                "dead letters are replayed and dropped here only if the instance has an admin token "
                "(http_options={'admin_token': …}); `penstock dead` does the same",
            )
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        if is_token(self._token, given):
            return None
        client = scope.get("client") or ("?",)
        log.warning("%s %s from %s: the admin token is missing or wrong", scope["method"], scope["path"], client[0])
        return responses.of_status(
            401, "this needs the header 'Authorization: Bearer <admin token>'", [(b"www-authenticate", b"Bearer")]
        )

    async def _work(self, name: str, query: Mapping[str, str]) -> HTTPResponse:
        backend, id_ = query.get("backend", ""), query.get("id", "")
        if not backend or bool(id_) != bool(name):
            raise ConfigError(f"the query must have {'backend and id' if name else 'backend alone'}")
        if backend not in (backends := self._caller.snapshot.backends):
            raise BackendNotFound(backend, backends)
        if not name:
            letters = await self._caller.dead_letter_stream(backend).newest(MOST_SHOWN)
            return responses.of_json({"dead_letters": [_shown(letter) for letter in letters]})
        await _WORK[name](self._caller, backend, id_)
        log.info("dead letter %s of backend %r was %s at the admin port", id_, backend, _DONE[name])
        return responses.of_json({"id": id_, "status": _DONE[name]})


def _shown(letter: DeadLetter) -> dict[str, Any]:
    entry = letter.entry
    return {
        "id": letter.id,
        "died_ms": letter.died_ms,
        "endpoint": None if entry is None else entry.header.endpoint,
        "request_id": None if entry is None else entry.shown_id,
        "error": letter.error,
        "deaths": [str(delivery.get("replica", "?")) for delivery in letter.deliveries],
    }
