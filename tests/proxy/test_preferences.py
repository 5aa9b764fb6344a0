from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock.handles.errors import ConfigError
from penstock.proxy.preferences import Preferences, idempotency_key_of, may_be_kept, preferences_of


def prefer(*values: str) -> Preferences:
    return preferences_of([(b"host", b"x"), *((b"prefer", value.encode("latin-1")) for value in values)])


def key(*values: bytes) -> str | None:
    return idempotency_key_of([(b"host", b"x"), *((b"idempotency-key", value) for value in values)])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["respond-async"], (True, None)),
        (["Respond-Async, wait=10"], (True, 10)),
        (["respond-async", "wait=10"], (True, 10)),
        (["respond-async,wait=10,wait=20"], (True, 10)),
        (['respond-async; x="a,b;c", wait = "7"'], (True, 7)),
        (["return=minimal, respond-async"], (True, None)),
        (["handling=lenient; wait=5"], (False, None)),
        (["wait=5"], (False, 5)),
    ],
)
def test_preferences_are_read_as_rfc_7240_writes_them(values: list[str], expected: Any) -> None:
    assert prefer(*values) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        ",",
        "respond-async=yes",
        "respond async",
        '"respond-async"',
        "=respond-async",
        'x="respond-async',
        "wait=-1",
        "wait=1.5",
        "wait=soon",
        "wait=99999999999",
        "wait",
    ],
)
def test_a_malformed_preference_is_ignored(value: str) -> None:
    assert prefer(value) == Preferences()


@pytest.mark.parametrize("malformed", ["@@", 'x="open', "a b c", "; ;", "ü"])
def test_the_preferences_beside_a_malformed_one_count(malformed: str) -> None:
    assert prefer(malformed, "respond-async") == (True, None)
    assert prefer(f"respond-async, {malformed}").respond_async


@given(st.text(st.characters(max_codepoint=255)))
def test_no_text_is_refused(value: str) -> None:
    prefer(value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b"8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (rb'"a \"quoted\" \\ key"', 'a "quoted" \\ key'),
        (b'" "', " "),
        (b"k" * 255, "k" * 255),
        (b'"' + b"k" * 255 + b'"', "k" * 255),
        (b" order:7/a ", "order:7/a"),
    ],
)
def test_a_key_is_a_string_of_rfc_8941_or_a_token(raw: bytes, expected: str) -> None:
    assert key(raw) == expected


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([b""], r"not ''"),
        ([b'""'], "must have 1 to 255 characters, not 0"),
        ([b"k" * 256], "must have 1 to 255 characters, not 256"),
        ([b"k" * 10_240], "must have 1 to 255 characters, not 10240"),
        ([b"(" * 10_240], "not a value of 10240 characters"),
        ([b'"open'], "not '\"open'"),
        ([rb'"a\b"'], "quoted string"),
        ([b"two words"], "not 'two words'"),
        ([b'"a";q=1'], "quoted string"),
        ([b"\xe9"], "not 'é'"),
        ([b"a,b"], "not 'a,b'"),
        ([b"a", b"a"], "may have one Idempotency-Key, not 2"),
    ],
)
def test_a_malformed_key_is_refused_by_name(raw: list[bytes], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        key(*raw)


def test_a_request_without_these_headers_has_neither() -> None:
    assert key() is None
    assert not may_be_kept({b"host": b"x"})
    assert may_be_kept({b"prefer": b""})
    assert may_be_kept({b"idempotency-key": b""})
