"""Dead letters: listed, replayed, dropped."""

from __future__ import annotations

from typing import Any, cast

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.dead_letter_limits import MAX_AGE_S
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendNotFound, ConfigError, Overloaded, PenstockError, WireError
from tests.handles.site import INSTANCE, Site
from tests.support.notebooks import shown_in_notebook
from tests.support.waiting import wait_until

KEYS = Keys(INSTANCE)


def bury(site: Site, entry: Entry | None, error: str = "every replica died") -> str:
    """Write a dead letter as a replica does, and return its id. Without an entry it is unreadable."""
    history = b'{"error": "%s", "deliveries": [{"replica": "model#1", "died_ms": 1}]}' % error.encode()
    fields = [b"garbage", b"\xff"] if entry is None else entry.fields()
    named: dict[Any, Any] = {b"history": history, **dict(zip(fields[::2], fields[1::2], strict=True))}
    with Redis.from_url(site.url) as redis:
        return cast("bytes", redis.xadd(KEYS.dead("model"), named)).decode()


def entry(data: bytes = b'"x"', **options: Any) -> Entry:
    return Entry("caller-1", "gone", Header(endpoint="ask", codec="json", **options), data)


def test_they_are_listed_oldest_first(site: Site, connected: Connection) -> None:
    site.declare()
    ids = [bury(site, entry(b"%d" % n), f"error {n}") for n in range(250)]
    letters = connected.dead_letters("model")
    assert len(letters) == 250
    assert [(letter.id, letter.error) for letter in letters] == [(id_, f"error {n}") for n, id_ in enumerate(ids)]


def test_a_dead_letter_has_its_request_and_its_history(site: Site, connected: Connection) -> None:
    site.declare()
    letter = connected.dead_letters("model").get(bury(site, entry(), "poison"))
    assert letter.entry is not None
    assert letter.entry.header.endpoint == "ask"
    assert [delivery["replica"] for delivery in letter.deliveries] == ["model#1"]
    assert connected.dead_letters("model").body(letter) == b'"x"'
    assert repr(letter) == f"DeadLetter({letter.id!r}, request={letter.entry.shown_id!r}, error='poison', deliveries=1)"
    shown = dict(row for row in shown_in_notebook(letter) if len(row) == 2)
    assert shown["error"] == "poison"
    assert shown["died with"].startswith("model#1 at ")


def test_a_replayed_dead_letter_is_served_and_deleted(site: Site, connected: Connection) -> None:
    ran: list[Any] = []

    def record(request: Any) -> None:
        ran.append(request.data)

    site.serve(record)
    letters = connected.dead_letters("model")
    letters.replay(bury(site, entry(deadline_ms=1)))
    wait_until(lambda: ran == ["x"])
    assert len(letters) == 0


def test_a_dropped_dead_letter_is_deleted(site: Site, connected: Connection) -> None:
    site.declare()
    letters = connected.dead_letters("model")
    id_ = bury(site, entry())
    letters.drop(id_)
    assert len(letters) == 0
    for act in (letters.drop, letters.get, letters.replay):
        with pytest.raises(PenstockError, match=f"no dead letter '{id_}'"):
            act(id_)


def test_an_unreadable_dead_letter_is_listed_and_cannot_be_replayed(site: Site, connected: Connection) -> None:
    site.declare()
    letters = connected.dead_letters("model")
    id_ = bury(site, None, "cannot read wire version None")
    assert letters.get(id_).entry is None
    assert letters.get(id_).error == "cannot read wire version None"
    with pytest.raises(WireError, match="cannot be read"):
        letters.replay(id_)
    letters.drop(id_)


def test_a_dead_letter_whose_body_has_expired_cannot_be_replayed(site: Site, connected: Connection) -> None:
    site.declare()
    letters = connected.dead_letters("model")
    large = Entry("caller-2", "gone", Header(codec="bytes"), large=True)
    id_ = bury(site, large)
    with pytest.raises(PenstockError, match="expired"):
        letters.replay(id_)
    with Redis.from_url(site.url) as redis:
        redis.set(KEYS.body("model", "caller-2"), bytes(LARGE + 1), px=60_000)
        assert letters.body(letters.get(id_)) == bytes(LARGE + 1)
        letters.drop(id_)
        assert not redis.exists(KEYS.body("model", "caller-2"))


def test_a_replayed_request_keeps_its_large_body_as_long_as_a_new_one(site: Site, connected: Connection) -> None:
    site.declare()
    letters = connected.dead_letters("model")
    id_ = bury(site, Entry("caller-2", "gone", Header(codec="bytes"), large=True))
    with Redis.from_url(site.url) as redis:
        redis.set(KEYS.body("model", "caller-2"), bytes(LARGE + 1), px=60_000)
        letters.replay(id_)
        assert redis.ttl(KEYS.body("model", "caller-2")) > MAX_AGE_S
        redis.delete(KEYS.body("model", "caller-2"), KEYS.batch("model"))


def test_a_full_queue_refuses_a_replay_and_the_dead_letter_stays(site: Site, connected: Connection) -> None:
    site.declare(max_queued_requests=1)
    letters = connected.dead_letters("model")
    first, second = bury(site, entry()), bury(site, entry())
    letters.replay(first)
    with pytest.raises(Overloaded):
        letters.replay(second)
    assert [letter.id for letter in letters] == [second]


def test_a_broker_out_of_memory_refuses_a_replay_and_the_dead_letter_stays(durable: EmbeddedServer) -> None:
    site = Site(durable.url)
    site.declare()
    dead = bury(site, entry())
    with Redis.from_url(durable.url) as redis, handles.connect(durable.url, INSTANCE) as connected:
        letters = connected.dead_letters("model")
        redis.config_set("maxmemory", 1)
        with pytest.raises(Overloaded, match="no memory left for requests to 'model'"):
            letters.replay(dead)
        redis.config_set("maxmemory", 0)
        assert [letter.id for letter in letters] == [dead]
    site.close()


def test_wrong_names_are_refused(site: Site, connected: Connection) -> None:
    site.declare()
    with pytest.raises(ConfigError, match="not the id of a dead letter"):
        connected.dead_letters("model").get("x")
    with pytest.raises(ConfigError, match="not the id of a dead letter"):
        connected.dead_letters("model").get(f"{2**64}-0")
    with pytest.raises(TypeError, match="letter must be a DeadLetter"):
        connected.dead_letters("model").body("1-0")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        connected.dead_letters("model").drop(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(BackendNotFound, match="missing"):
        connected.dead_letters("missing").replay("1-0")
    with pytest.raises(ConfigError, match="a backend"):
        connected.dead_letters("not a name")
