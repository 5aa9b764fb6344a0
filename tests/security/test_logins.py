"""Logins: the user in the id of a caller, rejected passwords, and certificates of servers."""

import pytest

from penstock import handles
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.errors import BrokerUnavailable
from tests.support.guarded import Guarded


async def test_the_id_of_a_caller_begins_with_its_user(broker: Guarded) -> None:
    assert RequestClient(broker.url("alice"), "default").id.startswith("alice@")
    assert "@" not in RequestClient("redis://:secret@localhost", "default").id
    assert RequestClient("redis://a%40b%7D:secret@localhost", "default").id.startswith("a%40b%7D@")


def test_a_rejected_login_raises_at_once_without_the_password(broker: Guarded) -> None:
    with pytest.raises(BrokerUnavailable, match=r"(?i)username-password") as raised:
        handles.connect(broker.url("alice", "wrong-one"))
    assert "wrong-one" not in str(raised.value)
    assert broker.denied()


def test_a_server_with_an_unknown_certificate_is_refused(broker: Guarded) -> None:
    url = f"rediss://alice:secret@localhost:{broker.port}"
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        handles.connect(url)


def test_a_server_with_another_name_in_its_certificate_is_refused(broker: Guarded) -> None:
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        handles.connect(broker.url("alice").replace("localhost", "127.0.0.1"))
