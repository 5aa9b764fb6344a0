"""Routing: the endpoint of a method and a path, with Starlette's patterns and convertors.

Where several routes match a path, the most specific one wins. The order of their creation does not matter, because the
registry has no order and every proxy must choose alike. Routes are compared segment by segment from the left: literal
text comes first, then ``uuid`` and ``int``, then ``float``, then ``str``, then ``path``. So ``/users/me`` precedes
``/users/{id:int}``, which precedes ``/users/{name}``, and ``/{rest:path}`` gets the paths that no other route matches.
As in Starlette, a route without the request's method leaves the path to the next route that matches.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, insort
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice, takewhile
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from starlette.routing import PARAM_REGEX, compile_path

from ..broker.errors import ConfigError
from ..broker.registry.records import EndpointRecord
from ..broker.wire.path_params import PathParam

logger = logging.getLogger("penstock.proxy")

RESERVED = "/-/"
"""Prefix of the system pages, which a proxy serves itself, such as ``/-/healthz``."""

# The convertors that are part of Starlette. One that a user registers exists in the user's process and in no proxy.
_RANKS = {"uuid": 1, "int": 1, "float": 2, "str": 3, "path": 4}
_LITERAL, _END = (0,), (5,)

_MOUNT = re.compile(r"/\{([a-zA-Z_][a-zA-Z0-9_]*):path\}$")


class RouteMatch(NamedTuple):
    """The endpoint of a request, and its path parameters as the convertors returned them."""

    endpoint: EndpointRecord
    params: dict[str, PathParam]


class MethodNotAllowed(NamedTuple):
    """The path has routes, but none for this method."""

    allowed: tuple[str, ...]


class NotFound(NamedTuple):
    """No route matches the path."""

    redirect: str | None
    """The path with its last slash added or removed, if that has a route: as in Starlette, clients are redirected."""


Match: TypeAlias = RouteMatch | MethodNotAllowed | NotFound
_NOT_FOUND = NotFound(None)


class _Route:
    """The route of one endpoint, compiled. Raises `ConfigError` or TypeError if it is not valid."""

    __slots__ = ("convertors", "endpoint", "is_static", "methods", "path", "place", "regex")

    def __init__(self, endpoint: EndpointRecord) -> None:
        self.endpoint = endpoint
        self.path = check_route(endpoint.route)
        self.regex, _, self.convertors = compile_path(self.path)
        self.methods = methods_of(endpoint)
        self.is_static = not self.convertors
        """Whether its path has no parameters."""
        self.place = (specificity(self.path), self.path, endpoint.name)
        """Its sort key among all routes."""

    def params(self, path: str) -> dict[str, PathParam] | None:
        # Starlette's patterns end in `$`, which also matches before a trailing line feed; `fullmatch` does not.
        if (match := self.regex.fullmatch(path)) is None:
            return None
        try:
            return {name: self.convertors[name].convert(text) for name, text in match.groupdict().items()}
        except ValueError:
            return None  # Python reads no integer of more than 4300 digits


class Routes:
    """The routes of one snapshot, compiled.

    Args:
        endpoints: the endpoints of the snapshot.
        former: the routes of an earlier one. Those of the same records are taken over, as compiling takes long.
    """

    __slots__ = ("_by_method", "_compiled", "_patterns", "_sorted", "_static")

    def __init__(self, endpoints: Iterable[EndpointRecord] = (), former: Routes | None = None) -> None:
        known = {} if former is None else former._compiled
        self._compiled: dict[str, tuple[EndpointRecord, _Route | None]] = {}
        """By name: the endpoint, and its route if it has one that is valid."""
        added: list[_Route] = []
        for endpoint in endpoints:
            compiled = known.get(endpoint.name)
            if compiled is None or compiled[0] is not endpoint:
                route = _compile(endpoint)
                compiled = endpoint, route
                if route is not None:
                    added.append(route)
            self._compiled[endpoint.name] = compiled
        gone = [route for _, route in known.values() if route is not None and not self._has(route)]
        self._sorted: list[_Route] = _replaced([] if former is None else former._sorted, gone, added)
        """All routes, in their order."""
        self._static: dict[str, dict[str, RouteMatch]] = {} if former is None else dict(former._static)
        """By path, then by method: what the routes without parameters match."""
        for path in {route.path for route in gone + added if route.is_static}:
            if exact := self._matches_at(path):
                self._static[path] = exact
            else:
                self._static.pop(path, None)
        gone, added = ([route for route in some if not route.is_static] for some in (gone, added))
        self._patterns: list[_Route] = _replaced([] if former is None else former._patterns, gone, added)
        """The routes with parameters, in their order."""
        self._by_method: dict[str, list[_Route]] = {} if former is None else dict(former._by_method)
        """Those with a method."""
        for method in {method for route in gone + added for method in route.methods}:
            those = ([route for route in some if method in route.methods] for some in (gone, added))
            self._by_method[method] = _replaced(self._by_method.get(method, []), *those)

    def _has(self, route: _Route) -> bool:
        compiled = self._compiled.get(route.endpoint.name)
        return compiled is not None and compiled[1] is route

    def _matches_at(self, path: str) -> dict[str, RouteMatch]:
        """Return what a path without parameters matches, by method."""
        exact: dict[str, RouteMatch] = {}
        first = bisect_left(self._sorted, (specificity(path), path, ""), key=_PLACE)
        for route in takewhile(lambda route: route.path == path, islice(self._sorted, first, None)):
            for method in route.methods:
                exact.setdefault(method, RouteMatch(route.endpoint, {}))
        return exact

    def match(self, method: str, path: str) -> Match:
        """Return the endpoint for ``method`` and ``path``, which is percent-decoded as in an ASGI scope."""
        if (exact := self._static.get(path)) is not None and (found := exact.get(method)) is not None:
            return found
        for pattern in self._by_method.get(method, ()):
            if (params := pattern.params(path)) is not None:
                return RouteMatch(pattern.endpoint, params)
        if allowed := self._allowed(path):
            return MethodNotAllowed(tuple(sorted(allowed)))
        other = path[:-1] if path.endswith("/") else path + "/"
        # A location that begins with two slashes names another host (RFC 3986, section 4.2).
        if path != "/" and not path.startswith("//") and self._allowed(other):
            return NotFound(other)
        return _NOT_FOUND

    def _allowed(self, path: str) -> set[str]:
        allowed = set(self._static.get(path, ()))
        for pattern in self._patterns:
            if not pattern.methods <= allowed and pattern.params(path) is not None:
                allowed |= pattern.methods
        return allowed

    def listing(self) -> dict[str, dict[str, Any]]:
        """Describe every route: ``{route: {"endpoint": name, "methods": [...]}}``.

        A route that several endpoints share, each with methods of its own, names the others under ``"also"``.
        """
        listing: dict[str, dict[str, Any]] = {}
        for route in self._sorted:
            entry: dict[str, Any] = {"endpoint": route.endpoint.name, "methods": sorted(route.methods)}
            if route.path in listing:
                listing[route.path].setdefault("also", []).append(entry)
            else:
                listing[route.path] = entry
        return listing


def check_route(route: object) -> str:
    """Return ``route`` if it is valid.

    Raises:
        TypeError: the route is not a string.
        ConfigError: the route does not begin with a slash, is below ``/-/``, has an unknown convertor, a repeated
            parameter or a brace outside of a parameter, or could never match a path.
    """
    if not isinstance(route, str):
        raise TypeError(f"a route must be a str, not {type(route).__name__}")
    if not route.startswith("/"):
        raise ConfigError(f"the route {route!r} must begin with '/'")
    if route.startswith(RESERVED):
        raise ConfigError(f"the route {route!r} is below {RESERVED!r}, which is reserved for the proxy's own pages")
    names: set[str] = set()
    for match in PARAM_REGEX.finditer(route):
        name, convertor = match[1], _convertor(match)
        if convertor not in _RANKS:
            known = ", ".join(sorted(_RANKS))
            raise ConfigError(f"the route {route!r} has the convertor {convertor!r}; the convertors are {known}")
        if name in names:
            raise ConfigError(f"the route {route!r} uses the parameter {name!r} twice")
        names.add(name)
    literal = PARAM_REGEX.sub("", route)
    if "{" in literal or "}" in literal:
        raise ConfigError(f"the route {route!r} has a brace that is not part of a parameter such as '{{name:int}}'")
    for char in "?#":
        if char in literal:
            raise ConfigError(f"the route {route!r} can never match: the path of a URL ends before {char!r}")
    if not literal.isprintable():  # lone surrogates are not printable either
        raise ConfigError(f"the route {route!r} contains a character that is not printable")
    return route


@lru_cache(maxsize=1024)
def mount_of(route: str) -> str:
    """Return the name of the parameter with which ``route`` ends, ``/{name:path}``; empty if it ends otherwise.

    >>> mount_of("/api/{tenant}/{rest:path}")
    'rest'
    """
    match = _MOUNT.search(route)
    return "" if match is None else match[1]


def clash(endpoints: Iterable[EndpointRecord], new: EndpointRecord) -> EndpointRecord | None:
    """Return the endpoint that already serves ``new``'s route with one of its methods, or None.

    Routes that differ only in the names of their parameters are the same route. Routes of different shapes never clash:
    where both match a path, the more specific one wins.
    """
    if new.route is None:
        return None
    wanted, methods = shape(new.route), methods_of(new)
    for other in endpoints:
        if other.name == new.name or other.route is None:
            continue
        if shape(other.route) == wanted and methods & methods_of(other):
            return other
    return None


def methods_of(endpoint: EndpointRecord) -> frozenset[str]:
    """Return the methods of ``endpoint``. As in Starlette, GET includes HEAD."""
    methods = frozenset(method.upper() for method in endpoint.methods)
    return methods | {"HEAD"} if "GET" in methods else methods


def shape(route: str) -> str:
    """Return ``route`` without the names of its parameters.

    >>> shape("/api/{user_id:int}/{name}") == shape("/api/{n:int}/{x:str}")
    True
    """
    return PARAM_REGEX.sub(lambda match: f"{{:{_convertor(match)}}}", route)


def specificity(route: str) -> tuple[tuple[int, ...], ...]:
    """Return a sort key: a route whose paths are a subset of another route's paths sorts before that route."""
    segments = route.split("/")[1:]
    keys = [_segment(segment, len(segments) - at) for at, segment in enumerate(segments, start=1)]
    return (*keys, _END)  # sorts last: of two routes with the same beginning, the longer one is more specific


def _segment(segment: str, following: int) -> tuple[int, ...]:
    ranks = [_RANKS.get(_convertor(match), 0) for match in PARAM_REGEX.finditer(segment)]
    if not ranks:
        return _LITERAL
    worst = max(ranks)
    # A `path` spans segments, so the segments after it do not line up with those of other routes. More of them mean
    # fewer matching paths.
    reach = -following if worst == _RANKS["path"] else 0
    return (worst, reach, -len(PARAM_REGEX.sub("", segment)), -len(ranks), sum(ranks))


def _convertor(match: re.Match[str]) -> str:
    return (match[2] or ":str")[1:]


_PLACE = attrgetter("place")


def _replaced(routes: list[_Route], gone: Iterable[_Route], added: Iterable[_Route]) -> list[_Route]:
    """Return a copy of ``routes``, which are in their order, without ``gone`` and with ``added``."""
    routes = list(routes)
    for route in gone:
        del routes[bisect_left(routes, route.place, key=_PLACE)]
    for route in added:
        insort(routes, route, key=_PLACE)
    return routes


def _compile(endpoint: EndpointRecord) -> _Route | None:
    if endpoint.route is None:
        return None
    try:
        return _Route(endpoint)
    except (ConfigError, TypeError) as e:
        # Only a record that was not written by `create_endpoint` has one. It must not harm the other endpoints.
        logger.error("endpoint %r is not served over HTTP: %s", endpoint.name, e)
        return None
