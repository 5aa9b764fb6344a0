"""The input of a batch job: another one is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock.handles.batch.job_input import Block, InputChain
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, ConfigError
from tests.handles.site import Site, echo


def run(connected: Connection, items: Any, **options: Any) -> list[Any]:
    return [result.get() for result in connected.batch("ask", job="same", **options).map(items)]


OTHERS: dict[str, Any] = {
    "other items": [*range(150), 999, *range(151, 300)],
    "one inserted": [*range(20), 999, *range(20, 300)],
    "another order": [*range(298), 299, 298],
    "fewer": range(299),
    "fewer than a block": range(3),
    "none": (),
    "more": range(301),
    "many more": range(1000),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_input_is_refused_and_the_error_names_the_way_out(site: Site, connected: Connection, name: str) -> None:
    site.serve(echo)
    assert run(connected, range(300)) == list(range(300))
    delivered: list[int] = []
    with pytest.raises(ConfigError, match=r"the job 'same' belongs to another input: .*--job same-\d+.*--restart-job"):
        delivered.extend(result.get() for result in connected.batch("ask", job="same").as_completed(OTHERS[name]))
    expected = list(OTHERS[name])
    assert all(expected[value] == value for value in delivered), "a result of one input never stands for another"
    assert run(connected, range(300)) == list(range(300))


def test_another_method_is_another_input(site: Site, connected: Connection) -> None:
    class Model:
        def __call__(self, request: Any) -> Any:
            return request.data

        def other(self, request: Any) -> Any:
            return -request.data

    site.serve(Model)
    assert run(connected, [1, 2]) == [1, 2]
    with pytest.raises(ConfigError, match="it began with the method '__call__', and this is 'other'"):
        run(connected, [1, 2], method_name="other")


def test_a_restarted_job_accepts_another_input(site: Site, connected: Connection) -> None:
    site.serve(echo)
    assert run(connected, [1, 2]) == [1, 2]
    assert run(connected, [3, 4, 5], restart_job=True) == [3, 4, 5]
    assert run(connected, [3, 4, 5]) == [3, 4, 5]
    with pytest.raises(ConfigError, match="belongs to another input"):
        run(connected, [1, 2])


def test_an_interrupted_job_continues_with_the_same_input(site: Site, connected: Connection) -> None:
    site.serve(echo)
    results = iter(connected.batch("ask", job="same", window=64).as_completed(iter(range(1000))))
    for _ in range(10):
        next(results)
    results.close()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    assert run(connected, range(1000)) == list(range(1000))


def test_failed_items_are_run_again_with_retry_errors(site: Site, connected: Connection) -> None:
    broken = {1, 3}
    ran: list[int] = []

    def pick(request: Any) -> Any:
        ran.append(request.data)
        if request.data in broken:
            raise ValueError("not now")
        return request.data

    site.serve(pick)
    producer = connected.batch("ask", job="same")
    failed = [result.index for result in producer.map(range(5)) if result.error is not None]
    assert failed == [1, 3]
    broken.clear()
    again = list(producer.map(range(5)))
    assert [type(result.error) for result in again if result.error is not None] == [BackendError, BackendError]
    ran.clear()
    assert run(connected, range(5), retry_errors=True) == [0, 1, 2, 3, 4]
    assert sorted(ran) == [1, 3]
    assert run(connected, range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("option", ["restart_job", "retry_errors"])
def test_options_of_a_job_need_its_name(connected: Connection, site: Site, option: str) -> None:
    site.declare()
    options: Any = {option: True}
    with pytest.raises(ConfigError, match=f"{option}=True needs a job"):
        connected.batch("ask", **options)
    options = {option: 1}
    with pytest.raises(TypeError, match=f"{option} must be a bool"):
        connected.batch("ask", job="j", **options)


def _blocks(rows: list[bytes], ends: list[int]) -> Iterator[Block]:
    chain = InputChain("j", [])
    for row in rows:
        chain.add(row)
        if chain.rows in ends and (block := chain.block()) is not None:
            yield block


@given(st.lists(st.binary(max_size=2), max_size=12), st.lists(st.binary(max_size=2), max_size=12), st.data())
def test_rows_are_verified_only_where_all_rows_before_them_are_the_same(
    first: list[bytes], second: list[bytes], data: st.DataObject
) -> None:
    ends = data.draw(st.lists(st.integers(1, 12)))
    known = list(_blocks(first, ends))
    chain = InputChain("j", known)
    try:
        for row in second:
            chain.add(row)
        chain.end()
    except ConfigError:
        assert first != second
    else:
        read = known[-1].rows if known else 0
        assert first[:read] == second[:read]
        assert chain.verified == len(second)
