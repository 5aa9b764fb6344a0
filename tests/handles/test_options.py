import pickle
from typing import Any

import pytest

from penstock.handles.errors import ConfigError
from penstock.handles.options import CallOptions


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("method_name", 7, TypeError, "method_name must be a str, not int"),
        ("method_name", "_private", ConfigError, "'_private' is private"),
        ("method_name", "no method", ConfigError, "'no method' is not the name of a method"),
        ("shard_key", 7, TypeError, "shard_key must be a str or None, not int"),
        ("http_method", None, TypeError, "http_method must be a str"),
        ("http_method", "GET /", ConfigError, "'GET /' is not a method of HTTP"),
        ("http_headers", [("a", "b")], TypeError, "http_headers must be a dict"),
        ("http_headers", {"a": 1}, TypeError, "1 is a int"),
        ("http_method", "", ConfigError, "'' is not a method of HTTP"),
        ("http_method", "GÉT", ConfigError, "'GÉT' is not a method of HTTP"),
        ("http_headers", {"a": "b\r\nc: d"}, ConfigError, r"'\\r' in the value of 'a': .* but for control characters"),
        ("http_headers", {"a": "\0"}, ConfigError, "but for control characters"),
        ("http_headers", {"a": "\ud800"}, ConfigError, "characters of ISO 8859-1"),
        ("http_headers", {"x": "Łukasz"}, ConfigError, "'Ł' in the value of 'x': .* ISO 8859-1 .* percent-encode"),
        ("http_headers", {"": "b"}, ConfigError, "has the name ''"),
        ("http_headers", {"a b": "c"}, ConfigError, "has the name 'a b'"),
        ("http_headers", {"a:": "c"}, ConfigError, "has the name 'a:'"),
        ("http_headers", {"a\n": "c"}, ConfigError, r"has the name 'a\\n'"),
        ("http_headers", {"ä": "c"}, ConfigError, "has the name 'ä'"),
        ("http_path", 7, TypeError, "http_path must be a str, not int"),
        ("http_path", "orders", ConfigError, "'orders' must begin with '/'"),
        ("http_path", "/orders?n=1", ConfigError, "the query is given by the keyword arguments"),
        ("timeout_s", "1", TypeError, "timeout_s must be a number"),
        ("timeout_s", True, TypeError, "timeout_s must be a number"),
        ("timeout_s", 0, ConfigError, "above 0"),
        ("timeout_s", float("nan"), ConfigError, "above 0"),
        ("timeout_s", float("inf"), ConfigError, "at most"),
        ("frobnicate", 1, TypeError, "options\\(\\) has no 'frobnicate'; it has method_name"),
    ],
)
def test_a_wrong_option_is_refused_by_name(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CallOptions().with_({name: value})


def test_a_token_with_a_line_feed_at_its_end_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"'\\n' in the value of 'authorization'") as raised:
        CallOptions().with_({"http_headers": {"authorization": "Bearer s3cret\n"}})
    assert "s3cret" not in str(raised.value)


def test_options_that_are_not_given_keep_their_values() -> None:
    options = CallOptions().with_({"shard_key": "s", "timeout_s": 2}).with_({"method_name": "train"})
    assert options == CallOptions(shard_key="s", timeout_s=2, method_name="train")


def test_options_are_not_changed_from_outside() -> None:
    headers: dict[str, Any] = {"a": "b"}
    options = CallOptions(http_headers=headers)
    headers["c"] = 1
    assert options.http_headers == {"a": "b"}


def test_options_can_be_pickled() -> None:
    options = CallOptions(http_method="M-SEARCH", http_headers={"x": "täglich\t"}, timeout_s=0.5)
    assert pickle.loads(pickle.dumps(options)) == options
