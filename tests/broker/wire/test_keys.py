import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, strategies as st

from penstock.broker.errors import ConfigError
from penstock.broker.wire.keys import Keys, check_name, shown_key

NAMES = st.from_regex(r"[A-Za-z0-9_.\-#]{1,20}", fullmatch=True)


def keys_of_backend(keys: Keys, backend: str) -> list[str]:
    return [
        keys.requests(backend),
        keys.batch(backend),
        keys.dead(backend),
        keys.signals(backend),
        keys.alive(backend, "replica"),
        keys.history(backend, "1-0"),
        keys.body(backend, "request"),
    ]


def keys_of_registry(keys: Keys) -> list[str]:
    return [
        keys.version,
        keys.backends,
        keys.endpoints,
        keys.feed,
        keys.owner,
        keys.settings,
        keys.code("digest"),
        keys.reports("replicas"),
    ]


def keys_of_caller(keys: Keys, caller: str) -> list[str]:
    return [keys.replies(caller), keys.reply_body(caller, "request")]


def slot(key: str) -> str:
    """Return the part of a key that Redis Cluster hashes."""
    tag = re.search(r"\{([^}]+)\}", key)
    return tag[1] if tag else key


@given(NAMES, NAMES)
def test_the_keys_of_one_script_are_in_one_slot_of_a_cluster(instance: str, backend: str) -> None:
    keys = Keys(instance)
    assert {slot(key) for key in keys_of_backend(keys, backend)} == {backend}
    assert {slot(key) for key in keys_of_registry(keys)} == {"registry"}
    assert {slot(key) for key in keys_of_caller(keys, "caller")} == {"caller"}


@given(NAMES, NAMES, NAMES)
def test_no_two_things_share_a_key(instance: str, one: str, other: str) -> None:
    keys = Keys(instance)
    all_keys = [key for tag in {one, other} for key in keys_of_backend(keys, tag)] + keys_of_registry(keys)
    assert len(set(all_keys)) == len(all_keys)


@given(NAMES, NAMES, NAMES)
def test_the_pattern_of_an_instance_matches_its_keys_and_no_others(instance: str, other: str, backend: str) -> None:
    pattern = Keys(instance).pattern
    for key in keys_of_backend(Keys(other), backend) + keys_of_registry(Keys(other)):
        assert fnmatchcase(key, pattern) == (instance == other)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "{a}", "a*", "é", "a\n", "x" * 129])
def test_a_name_that_cannot_be_part_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"an instance .* must be 1 to 128 letters"):
        Keys(name)


def test_a_name_that_is_not_a_string_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="a backend must be a str, not int"):
        check_name("a backend", 7)


@given(NAMES, NAMES, st.sampled_from(["", "alice", "a@b{}"]), st.from_regex("[0-9a-f]{12}|job:j", fullmatch=True))
def test_a_shown_key_reveals_no_caller_and_no_call(instance: str, backend: str, user: str, name: str) -> None:
    keys, caller, call = Keys(instance), Keys.caller(user, name), "0123456789abcdef" * 2
    shown = [shown_key(key) for key in (keys.replies(caller), keys.reply_body(caller, call), keys.body(backend, call))]
    for key in shown[:2]:
        assert f"{{{caller}}}" not in key
    for key in shown[1:]:
        assert call not in key
    # The parts that an operator needs remain: the owner of the key and its kind.
    prefix = f"{{{Keys.caller(user, '...')}}}"
    assert [key.removeprefix(f"penstock:{instance}:") for key in shown[:2]] == [
        f"{prefix}:replies",
        f"{prefix}:body:...",
    ]
    for key in keys_of_backend(keys, backend)[:-1] + keys_of_registry(keys):
        assert shown_key(key) == key
