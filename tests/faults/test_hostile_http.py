"""Clients that pipeline without end, beside others: those are answered as ever."""

from __future__ import annotations

from tests.faults.conftest import Scale, StartClient
from tests.faults.injected.hostile import hostile
from tests.faults.load.backends import Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import check, serve_work
from tests.faults.test_garbage import pids
from tests.faults.test_soak import resident_mib

_GROWTH_MIB = 64.0
"""A proxy may grow by so much: far less than one connection could make it hold before there were bounds."""


def test_hostile_pipelining_disturbs_no_other_client(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    before = pids(client)
    with traffic(client, rate=20, for_s=2, prefix="before") as quiet:
        pass
    proxies = [one["pid"] for one in client.status()["proxies"].values()]
    base = [resident_mib(pid) for pid in proxies]
    assert client.http_url is not None
    with hostile(client.http_url) as clients, traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        pass
    seen, grown = load.outcomes, max(resident_mib(pid) - was for pid, was in zip(proxies, base, strict=True))
    kinds = ", ".join(f"{count} times one that {kind}" for kind, count in sorted(clients.done.items()))
    notes = (
        f"{clients.answered} of {clients.pipelined} pipelined answered in order; {kinds}; proxies grew {grown:.0f} MiB"
    )
    table.add(Row.of("hostile pipelining", scale.for_s, seen, twice=check(seen, journal), notes=notes))
    assert len(quiet.outcomes.answered) == quiet.outcomes.sent
    assert (len(seen.answered), seen.refused.total(), len(seen.cut)) == (seen.sent, 0, 0)
    assert clients.answered == clients.pipelined > 0
    assert len(clients.done) == 5
    assert grown < _GROWTH_MIB
    assert pids(client) == before
