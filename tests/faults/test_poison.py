"""A request that kills every process it meets."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from penstock import serve
from tests.faults.conftest import Scale, StartClient
from tests.faults.load.backends import Journal, Poisonable
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.serve.backends import SMALL
from tests.support.waiting import wait_until

SERVICE_S = 0.02
MAX_DELIVERIES = 3


def test_a_poison_request_alone_becomes_a_dead_letter_and_new_code_answers_it(
    start: StartClient, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    config = {"num_replicas": 3, "max_deliveries": MAX_DELIVERIES}
    client.create_backend("work", Poisonable, journal.folder, SERVICE_S, config=config, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    handle, letters = client.get_handle("work"), client.dead_letters("work")
    doses = 0
    with traffic(client, rate=scale.rate / 2, for_s=scale.for_s / 2) as load:
        while load.sending:
            doses += 1
            with pytest.raises(serve.errors.DeliveryLimitExceeded):
                handle.remote(f"poison{doses}").result(timeout=60)
            time.sleep(scale.every_s)
    deaths = Counter({name: count for name, count in journal.starts().items() if name.startswith("poison")})
    seen = load.outcomes
    notes = f"{doses} poisonous: {deaths.total()} deaths, {len(letters)} dead letters"
    table.add(Row.of("poison", scale.for_s / 2, seen, notes=notes))
    assert seen.wrong == []
    assert len(seen.answered) == seen.sent
    assert max(deaths.values()) <= MAX_DELIVERIES
    found = list(letters)
    assert len(found) == len(deaths) == doses
    assert {len(letter.deliveries) for letter in found} == {MAX_DELIVERIES}

    client.update_backend("work", Poisonable, journal.folder, SERVICE_S, immune=True)
    for letter in found:
        letters.replay(letter.id)
    wait_until(lambda: all(journal.starts()[name] == deaths[name] + 1 for name in deaths))
    wait_until(lambda: client.status()["backends"]["work"]["queued"] == 0)
    assert len(letters) == 0
