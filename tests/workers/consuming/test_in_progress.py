"""The claims that a replica holds."""

from __future__ import annotations

import asyncio

import pytest

from penstock.broker.wire.requests import Entry, Header
from penstock.workers.claim import Claim
from penstock.workers.consuming import in_progress
from penstock.workers.consuming.in_progress import InProgress


def hold(claims: InProgress, ref: bytes) -> Claim:
    claim = Claim(ref, Entry("id", "caller", Header()))
    claims.add(claim)
    return claim


def test_a_claim_is_held_until_it_is_released() -> None:
    claims = InProgress()
    claim = hold(claims, b"1-0")
    assert b"1-0" in claims
    assert not claim.is_released
    claims.release(claim)
    assert b"1-0" not in claims
    assert claim.is_released


def test_claims_that_wait_have_not_started() -> None:
    claims = InProgress()
    claims.waiting.append(hold(claims, b"1-0"))
    assert not claims.any_started
    hold(claims, b"2-0")
    assert claims.any_started


def test_claims_released_during_a_query_are_recorded() -> None:
    claims = InProgress()
    before, during = hold(claims, b"1-0"), hold(claims, b"2-0")
    claims.release(before)
    with claims.recording_released() as released:
        claims.release(during)
    claims.release(hold(claims, b"3-0"))
    assert released == {b"2-0"}


async def test_waiting_until_it_is_empty_ends_with_the_last_claim_or_the_timeout() -> None:
    claims = InProgress()
    assert await claims.wait_until_empty(0.0)
    first, second = hold(claims, b"1-0"), hold(claims, b"2-0")
    assert not await claims.wait_until_empty(0.01)
    waiting = asyncio.ensure_future(claims.wait_until_empty(60.0))
    await asyncio.sleep(0)
    claims.release(first)
    await asyncio.sleep(0)
    assert not waiting.done()
    claims.release(second)
    assert await waiting


def test_a_withdrawn_entry_is_remembered_until_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_progress, "_MAX_WITHDRAWN", 2)
    claims = InProgress()
    for ref in (b"1-0", b"2-0", b"3-0"):
        claims.remember_withdrawn(ref)
    assert not claims.forget_withdrawn(b"1-0"), "the oldest beyond the limit is forgotten"
    assert claims.forget_withdrawn(b"2-0")
    assert not claims.forget_withdrawn(b"2-0")
    assert claims.forget_withdrawn(b"3-0")
