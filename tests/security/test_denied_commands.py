"""Commands that the users of ``docs/security.md`` may not give, as they would read or forge what is of others."""

import asyncio
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.requests import Header
from penstock.handles.calls.request_client import RequestClient
from tests.security.site import KEYS, Site, echo
from tests.support.guarded import Guarded
from tests.support.waiting import wait_until_async

REQUESTS, BODY, REPLIES = KEYS.requests("f"), KEYS.body("f", "r"), KEYS.replies("bob@1")
OWN = KEYS.replies("alice@1")

READING = [
    *(("XRANGE", key, "-", "+") for key in (REQUESTS, KEYS.batch("f"), KEYS.dead("f"), KEYS.signals("f"), REPLIES)),
    ("XREVRANGE", REQUESTS, "+", "-"),
    ("XREAD", "STREAMS", REQUESTS, "0"),
    ("XREAD", "STREAMS", OWN, REQUESTS, "0", "0"),
    ("XREAD", "STREAMS", REPLIES, "0"),
    ("XREADGROUP", "GROUP", "replicas", "me", "STREAMS", REQUESTS, ">"),
    ("XPENDING", REQUESTS, "replicas"),
    ("XCLAIM", REQUESTS, "replicas", "me", 0, "1-0"),
    ("XAUTOCLAIM", REQUESTS, "replicas", "me", 0, "0"),
    ("XINFO", "STREAM", REQUESTS, "FULL"),
    ("XINFO", "CONSUMERS", REQUESTS, "replicas"),
    ("XGROUP", "CREATE", REQUESTS, "mine", "0"),
    ("DUMP", REQUESTS),
    ("COPY", REQUESTS, OWN),
    ("RENAME", REQUESTS, OWN),
    ("RENAME", BODY, OWN),
    ("SORT", REQUESTS, "BY", "nosort", "STORE", OWN),
    ("OBJECT", "ENCODING", REQUESTS),
    ("MIGRATE", "127.0.0.1", 1, REQUESTS, 0, 1),
    ("GET", BODY),
    ("GETDEL", BODY),
    ("GETEX", BODY),
    ("GETRANGE", BODY, 0, -1),
    ("MGET", OWN, BODY),
    ("SET", BODY, "", "GET"),
    ("GET", KEYS.reply_body("bob@1", "r")),
    ("GET", KEYS.job("bob@job:j")),
    ("GET", KEYS.code("digest")),
    ("GET", KEYS.settings),
    ("HGETALL", KEYS.reports("proxies")),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("RANDOMKEY",),
]
WRITING = [
    ("HSET", KEYS.backends, "f", "{}"),
    ("HSET", KEYS.endpoints, "f", "{}"),
    ("HDEL", KEYS.backends, "f"),
    ("HSET", KEYS.reports("replicas"), "f#1", "{}"),
    ("INCR", KEYS.version),
    ("SET", KEYS.version, 7),
    ("SET", KEYS.code("digest"), "code"),
    ("SET", KEYS.settings, "{}"),
    ("SET", KEYS.owner, "me"),
    ("XADD", KEYS.feed, "*", "version", 7),
    ("DEL", KEYS.backends),
    ("UNLINK", KEYS.backends),
    ("RENAME", OWN, KEYS.backends),
    ("COPY", OWN, KEYS.code("digest")),
    ("XADD", REPLIES, "*", "v", "1"),
    ("UNLINK", REPLIES),
    ("SET", KEYS.alive("f", "f#1"), 1),
    ("DEL", KEYS.alive("f", "f#1")),
]
RULING = [
    ("FLUSHALL",),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "alice", "+@all"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "USER", "bob"),
    ("MONITOR",),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LIST"),
    ("SAVE",),
    ("REPLICAOF", "NO", "ONE"),
    ("PUBLISH", "c", "m"),
    ("SUBSCRIBE", "c"),
]


def test_a_caller_is_denied_every_command_of_other_roles(broker: Guarded) -> None:
    """Neither by itself nor in a script."""
    with Redis.from_url(broker.url("alice")) as redis:
        for command in (*READING, *WRITING, *RULING):
            assert _is_denied(redis, *command), command
            with pytest.raises(ResponseError):
                redis.execute_command("EVAL", "return redis.call(unpack(ARGV))", 0, *command)
    assert broker.denied()


@pytest.mark.parametrize("user", ["proxy", "replica"])
def test_proxies_and_replicas_may_not_write_the_registry(user: str, broker: Guarded) -> None:
    own = KEYS.reports("replicas")
    with Redis.from_url(broker.url(user)) as redis:
        for command in (command for command in WRITING if "{registry}" in str(command)):
            theirs = (KEYS.reports("proxies") if user == "replica" and part == own else part for part in command)
            assert _is_denied(redis, *theirs), command
    assert broker.denied()


@pytest.mark.parametrize("user", ["proxy", "replica"])
def test_only_the_caller_of_a_batch_job_can_read_its_secret(user: str, broker: Guarded) -> None:
    with Redis.from_url(broker.url(user)) as redis:
        for command in ("GET", "GETDEL", "DUMP", "TYPE", "DEL"):
            assert _is_denied(redis, command, KEYS.job("alice@job:j")), command
        assert _is_denied(redis, "SET", KEYS.job("alice@job:j"), "{}")
    assert broker.denied()


def _is_denied(redis: Any, *command: Any) -> bool:
    try:
        redis.execute_command(*command)
    except NoPermissionError:
        return True
    return False


async def test_a_caller_cannot_read_the_requests_of_other_callers(site: Site, broker: Guarded) -> None:
    """And what it tries leaves that as it was."""
    backend = await site.declare()
    before = await site.registry.snapshot()
    bob = RequestClient(broker.url("bob"), "default")
    await bob.open()
    outcomes: list[Any] = []
    call = bob.send(backend, Header(), b"x" * (LARGE + 1), outcomes.append)
    await call.accepted()

    def try_all() -> None:
        with Redis.from_url(broker.url("alice")) as redis:
            for command in (*READING, *WRITING, *RULING):
                own = [str(part).replace(REPLIES, KEYS.replies(bob.id)) for part in command]
                own = [part.replace(BODY, KEYS.body("f", call.id)) for part in own]
                with pytest.raises(NoPermissionError):
                    redis.execute_command(*own)

    await asyncio.to_thread(try_all)
    assert (await site.registry.snapshot()) == before
    await asyncio.to_thread(broker.denied)
    await site.serve(echo)
    await wait_until_async(lambda: outcomes)
    assert outcomes[0].body == b"x" * (LARGE + 1)
    await bob.close()


async def test_a_caller_cannot_write_results_and_a_replica_cannot_read_them(site: Site, broker: Guarded) -> None:
    result, record = KEYS.result("f", "0" * 48), KEYS.kept("f", "0" * 48)
    with Redis.from_url(broker.url("alice")) as redis:
        for command in ("DEL", "UNLINK", "DUMP"):
            assert _is_denied(redis, command, result), command
            assert _is_denied(redis, command, record), command
        assert _is_denied(redis, "SET", result, "forged")
        assert _is_denied(redis, "HGETALL", record)
    with Redis.from_url(broker.url("replica")) as redis:
        assert _is_denied(redis, "GET", result)
        assert _is_denied(redis, "GETRANGE", result, 0, 9)
        assert _is_denied(redis, "GET", KEYS.result_body("f", "0" * 48))
        assert _is_denied(redis, "GET", KEYS.idempotency_key("f", "digest"))
    assert await asyncio.to_thread(broker.denied)
