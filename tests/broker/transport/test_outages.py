"""The log lines about outages of a broker."""

from __future__ import annotations

import logging

import pytest

from penstock.broker.transport import outages

LOG = "penstock.broker.transport.outages"


class Connection:
    """Something that notices an outage."""


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOG)


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records]


def test_an_outage_ends_when_the_last_connection_is_well_again(caplog: pytest.LogCaptureFixture) -> None:
    url, first, second = "redis://last", Connection(), Connection()
    outages.report_began(url, first, "lost it")
    outages.report_began(url, second, "lost it")
    outages.report_ended(url, first)
    assert "is back" not in caplog.text
    outages.report_ended(url, second)
    assert levels(caplog) == ["WARNING", "DEBUG", "INFO"]
    assert "the broker at redis://last is back" in caplog.text


def test_connections_that_notice_one_after_another_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    for connection in (Connection(), Connection(), Connection()):
        outages.report_began("redis://turns", connection, "lost it")
        outages.report_ended("redis://turns", connection)
    assert levels(caplog) == ["WARNING", *["INFO"] * 5]


def test_a_later_outage_warns_again(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "ONE_OUTAGE_S", 0.0)
    for connection in (Connection(), Connection()):
        outages.report_began("redis://later", connection, "lost it")
        outages.report_ended("redis://later", connection)
    assert levels(caplog) == ["WARNING", "INFO", "WARNING", "INFO"]


def test_outages_of_two_brokers_are_apart(caplog: pytest.LogCaptureFixture) -> None:
    outages.report_began("redis://one", Connection(), "lost it")
    outages.report_began("redis://two", Connection(), "lost it")
    assert levels(caplog) == ["WARNING", "WARNING"]


def test_closing_a_connection_does_not_say_that_the_broker_is_back(caplog: pytest.LogCaptureFixture) -> None:
    url, closed, next_one = "redis://closed", Connection(), Connection()
    outages.report_began(url, closed, "lost it")
    outages.report_ended(url, closed, closing=True)
    outages.report_began(url, next_one, "lost it")
    assert levels(caplog) == ["WARNING", "WARNING"]
