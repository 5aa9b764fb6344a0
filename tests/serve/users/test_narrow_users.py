"""Clients whose Redis user has fewer permissions than an owner needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock import serve
from penstock.handles.connection import Connection
from penstock.handles.errors import NotPermitted
from tests.security.test_refusals import limited


def _use_handle(client: serve.Client) -> Any:
    return client.get_handle("api").remote(1).result(timeout=60)


USES: list[Callable[[serve.Client], Any]] = [
    serve.Client.status,
    serve.Client.list_backends,
    serve.Client.list_endpoints,
    _use_handle,
    lambda client: client.update_backend_config("f", {"max_queued_requests": 9_000}),
    lambda client: client.update_backend_config("f", {"max_queued_requests": 10_000}),
    lambda client: client.set_traffic("api", {"f": 1.0}),
    lambda client: [*client.dead_letters("f")],
    lambda client: [*client.batch("api").map([1])],
]
OWNERS = (
    *("eval", "evalsha", "exists", "get", "hget", "hgetall", "hset", "incr", "pttl", "set", "unlink"),
    *("xadd", "xdel", "xinfo|groups", "xlen", "xrange", "xread", "xrevrange"),
)


def test_a_client_without_a_permission_raises_not_permitted_and_no_other_error(standing: serve.Client) -> None:
    refused: set[str] = set()
    for command in OWNERS:
        with limited(standing.redis_url, "+@all", f"-{command}") as url:
            for use in USES:
                try:
                    with serve.connect(url, standing.instance) as client:
                        use(client)
                except NotPermitted:
                    refused.add(command)
                finally:
                    Connection(url, standing.instance).close()  # otherwise the next one would share its connection
    assert {"eval", "evalsha", "get", "hgetall", "xread", "xinfo|groups"} <= refused
    assert standing.get_handle("api").remote(1).result(timeout=60)["data"] == 1
