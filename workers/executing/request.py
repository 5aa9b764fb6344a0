"""Requests as user code receives them: Starlette requests whose bodies have arrived."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlencode

from starlette import requests
from starlette.datastructures import Address, FormData, Headers, ImmutableMultiDict, QueryParams
from starlette.formparsers import MultiPartException
from starlette.types import Message, Scope

from ...broker.wire import exact_json
from ...broker.wire._fields import RAW_PATH_SAFE
from ...broker.wire.kept import MAX_PROGRESS_BYTES
from ...broker.wire.path_params import PathParam
from ...broker.wire.requests import HTTP_CODEC, Entry
from ...handles.codec import decode, load_json
from ...handles.errors import ConfigError, MalformedBody
from ...handles.json_bounds import read_bounded
from ...handles.options import model_id_of
from ...runtime.notebooks import NotebookTable
from .forms import check_fields, content_type_of, is_json, parse_form

_NOT_READ: Any = object()

# With an older version, Starlette's responses would also listen for a disconnect message.
_ASGI = {"version": "3.0", "spec_version": "2.4"}

_SCOPE_TEXTS = ("scheme", "http_version", "root_path")


class Request(NotebookTable, requests.Request):
    """One request, from HTTP or from a handle.

    It is a Starlette ``Request``, and none of its coroutines waits: the body came with the request. ``data`` needs no
    ``await``, and is the same for sync and async code.
    """

    # Most backends read only the body: everything else is built on first use, and the ASGI scope only if it is needed.
    _scope: Scope | None = None
    _path_params: dict[str, PathParam] | None = None
    _data: Any = _NOT_READ
    _form: FormData | None = None
    _stream_consumed = False
    _is_disconnected = False
    _received = False

    def __init__(
        self, entry: Entry, allow_pickle: bool = False, on_progress: Callable[[bytes], None] | None = None
    ) -> None:
        # Starlette's constructor is not called: it needs the scope.
        self._entry = entry
        self._allow_pickle = allow_pickle
        self._on_progress = on_progress
        self._body = entry.body

    def __repr__(self) -> str:
        fields = self._notebook_fields()
        named = "".join(f", {name}={value!r}" for name, value in fields.items() if name not in ("method", "path"))
        return f"<Request {fields['method']} {fields['path']}{named}>"

    def _notebook_fields(self) -> Mapping[str, object]:
        """Return what describes it, without the values of headers and the body, which may be secret."""
        fields: dict[str, object] = {"method": self.method, "path": self._entry.header.path}
        if self.path_params:
            fields["path_params"] = self.path_params
        if query := dict(self.query_params):
            fields["query_params"] = query
        if content_type := self._content_type():
            fields["content_type"] = content_type
        return {**fields, "body_bytes": len(self._body), "request_id": self.request_id}

    @property
    def scope(self) -> Scope:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The ASGI scope (https://asgi.readthedocs.io/en/latest/specs/www.html#http-connection-scope)."""
        if self._scope is None:
            self._scope = self._build_scope()
        return self._scope

    @scope.setter
    def scope(self, scope: Scope) -> None:
        self._scope = scope

    @property
    def method(self) -> str:
        return self._entry.header.method

    @property
    def path_params(self) -> dict[str, Any]:
        """The parameters of the route, converted to the types of its convertors: str, int, float or UUID."""
        if self._path_params is None:
            # A copy, as requests of a batch share one header.
            self._path_params = dict(self._entry.header.path_params)
        return cast("dict[str, Any]", self._path_params)

    @property
    def headers(self) -> Headers:
        if not hasattr(self, "_headers"):
            self._headers = Headers(raw=[(_latin(name), _latin(value)) for name, value in self._entry.header.headers])
        return self._headers

    @property
    def query_params(self) -> QueryParams:
        """The query of the URL, or the keyword arguments of a handle with their values unchanged."""
        if not hasattr(self, "_query_params"):
            query = self._entry.header.query
            self._query_params = QueryParams(query) if isinstance(query, str) else _Keywords(query)
        return self._query_params

    @property
    def client(self) -> Address | None:
        header = self._entry.header
        if header.scope is not None and (address := _address(header.scope.get("client"))) is not None:
            return Address(address[0], cast("int", address[1]))  # the port is None if the proxy knew none
        host, _, port = header.client.rpartition(":")
        return Address(host, int(port)) if host and port.isdecimal() else None

    @property
    def request_id(self) -> str:
        """The ``X-Request-Id``: sent by the caller or made for it, returned to it, and part of every log line."""
        return self._entry.header.request_id

    @property
    def model_id(self) -> str:
        """The model that the request names (``X-Serve-Model-Id``); an empty string if it names none."""
        return model_id_of(self._entry.header.headers)

    @property
    def data(self) -> Any:
        """The decoded body.

        That is the value that a handle sent. Over HTTP it is a JSON value if the content type is JSON, else bytes.
        Without a body it is None if a handle sent None or the content type is JSON, else ``b""``.

        Raises:
            MalformedBody: the body does not fit its content type, or is pickled and the backend has no
                ``allow_pickle``. Unless user code catches it, the reply has the status 400.
        """
        if self._data is _NOT_READ:
            self._data = self._read()
        return self._data

    async def body(self) -> bytes:
        return self._body

    async def json(self) -> Any:
        """Return the body as a JSON value, for any content type; None if there is no body.

        Raises:
            MalformedBody: the body is not JSON.
        """
        if not hasattr(self, "_json"):
            try:
                self._json = read_bounded(load_json, self._body) if self._body else None
            except MalformedBody as e:
                content_type = self._content_type()
                if is_json(content_type) or self._entry.header.codec != HTTP_CODEC:
                    raise
                said = repr(content_type) if content_type else "not declared"
                raise MalformedBody(f"{e}; its content type is {said}") from None
        return self._json

    def report_progress(self, value: object) -> None:
        """Show ``value`` in the status of the request, in place of the value reported before. Any thread may call it.

        Only the status of a submitted request is read. For any other request, the value is checked and dropped.

        Args:
            value: a JSON value, at most 4 KiB as JSON.

        Raises:
            TypeError: it is not a JSON value.
            ConfigError: it is longer than that.
        """
        try:
            progress = exact_json.dumps(value)
        except TypeError as e:
            raise TypeError(f"the progress must be a JSON value: {e}") from None
        if len(progress) > MAX_PROGRESS_BYTES:
            raise ConfigError(
                f"the progress has {len(progress)} bytes as JSON; at most {MAX_PROGRESS_BYTES} are allowed"
            )
        if self._on_progress is not None:
            self._on_progress(progress)

    async def is_disconnected(self) -> bool:
        """Return False. A caller that leaves cancels ``async def`` code; other code runs to its end."""
        return False

    async def _get_form(self, *, max_fields: float = 1000, **limits: Any) -> FormData:
        if self._form is not None:
            return self._form
        check_fields(self.headers.get("content-type", ""), self._body, max_fields)
        try:
            return await parse_form(super()._get_form(max_fields=max_fields, **limits), len(self._body))
        # python-multipart raises a ValueError; a missing boundary or an unknown charset raises a LookupError.
        except (MultiPartException, ValueError, LookupError) as e:
            raise MalformedBody(f"the body is not a form: {e}") from e

    async def _receive(self) -> Message:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._received:
            await asyncio.Event().wait()  # a disconnect message never comes
        self._received = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Message) -> NoReturn:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError(f"a backend replies by its return value; it cannot send {message.get('type')!r}")

    def _read(self) -> Any:
        if (codec := self._entry.header.codec) != HTTP_CODEC:
            return decode(codec, self._body, allow_pickle=self._allow_pickle)
        if not is_json(self._content_type()):
            return self._body
        return read_bounded(load_json, self._body) if self._body else None

    def _content_type(self) -> str:
        return content_type_of(self._entry.header.headers)

    def _build_scope(self) -> Scope:
        header = self._entry.header
        query = header.query if isinstance(header.query, str) else _urlencode(header.query)
        headers = self.headers
        scope: Scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": "1.1",
            "method": header.method,
            "scheme": "http",
            "path": header.path,
            "raw_path": quote(header.path, safe=RAW_PATH_SAFE, errors="surrogatepass").encode(),
            "query_string": _latin(query),
            "root_path": "",
            "headers": headers.raw,
            "client": self.client,
            "server": _server(headers.get("host")),
            "path_params": self.path_params,
            "state": {},
            "extensions": {},
        }
        if header.scope is not None:
            scope.update(_carried(header.scope))
        return scope


class _Keywords(QueryParams):
    """Keyword arguments as query parameters. Their values need not be strings."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        # The constructor of QueryParams would convert each to a string.
        ImmutableMultiDict.__init__(self, arguments)  # pyright: ignore[reportUnknownMemberType]

    def __str__(self) -> str:
        return _urlencode(dict(self))


def _urlencode(arguments: dict[str, Any]) -> str:
    return urlencode({key: value if isinstance(value, str) else _compact(value) for key, value in arguments.items()})


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _latin(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:  # from a handle; over HTTP, texts are latin-1
        return text.encode("utf-8", "surrogatepass")


def _carried(members: dict[str, Any]) -> Scope:
    """Return the members of a scope that `proxy.scopes` sent. Members of other releases are ignored."""
    scope: Scope = {name: members[name] for name in _SCOPE_TEXTS if isinstance(members.get(name), str)}
    if isinstance(raw_path := members.get("raw_path"), str):
        scope["raw_path"] = _latin(raw_path)
    if (server := _address(members.get("server"))) is not None:
        scope["server"] = server
    if isinstance(state := members.get("state"), dict):
        # A copy, as consecutive requests can share one header.
        scope["state"] = copy.deepcopy(cast("dict[str, Any]", state))
    return scope


def _address(value: Any) -> tuple[str, int | None] | None:
    try:
        host, port = value
    except (TypeError, ValueError):
        return None
    if not isinstance(host, str) or not isinstance(port, int | None):
        return None
    return host, port


def _server(host: str | None) -> tuple[str, int | None] | None:
    if not host:
        return None
    name, colon, port = host.rpartition(":")
    return (name, int(port)) if colon and port.isdecimal() else (host, None)
