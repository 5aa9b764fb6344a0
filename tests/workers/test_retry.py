"""Retry policy: the errors that are retried, the number of attempts and the backoff, without a replica."""

import math
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, strategies as st
from starlette.exceptions import HTTPException

from penstock.broker.registry.records import RetrySpec
from penstock.handles.errors import ConfigError, MalformedBody
from penstock.workers.retry import Retry, RetryPolicy, RetryWish, check_names, shown_error


class Flaky(ConnectionError):
    class Inner(Exception): ...


def wish(error: BaseException, *on: str) -> RetryWish | None:
    return RetryPolicy(RetrySpec(on=on) if on else None).wish_of(error)


@pytest.mark.parametrize(
    "name",
    [
        "Flaky",
        "ConnectionError",
        "OSError",
        "builtins.ConnectionError",
        "Exception",
        "BaseException",
        f"{__name__}.Flaky",
        "tests.workers.test_retry.Flaky",
    ],
)
def test_an_error_is_named_by_its_class_or_a_base_with_or_without_a_module(name: str) -> None:
    assert wish(Flaky("now"), "KeyError", name) == RetryWish()


@pytest.mark.parametrize("name", ["ValueError", "flaky", "other.Flaky", "Inner", "TimeoutError", "object.x"])
def test_another_error_is_not_retried(name: str) -> None:
    assert wish(Flaky("now"), name) is None


def test_an_error_may_be_named_by_a_module_that_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``requests.ConnectionError``, which is defined in ``requests.exceptions``."""
    library: Any = ModuleType("library_of_errors")
    library.Unavailable = Flaky
    monkeypatch.setitem(sys.modules, "library_of_errors", library)
    assert wish(Flaky(), "library_of_errors.Unavailable") == RetryWish()
    check_names(["library_of_errors.Unavailable"], may_be_elsewhere=False)
    assert wish(Flaky(), "library_of_errors.Other") is None


def test_a_nested_class_is_named_by_its_own_name_or_its_whole_one() -> None:
    for name in ("Inner", "Flaky.Inner", f"{__name__}.Flaky.Inner"):
        assert wish(Flaky.Inner(), name) == RetryWish()
    check_names([f"{__name__}.Flaky.Inner"], may_be_elsewhere=False)


@pytest.mark.parametrize("error", [HTTPException(404), HTTPException(503), MalformedBody("not JSON")])
def test_what_code_raises_as_a_reply_is_retried_only_if_it_is_named_itself(error: Exception) -> None:
    assert wish(error, "Exception") is None
    assert wish(error, type(error).__name__) == RetryWish()


def test_without_a_configuration_only_retry_is_retried() -> None:
    assert wish(Flaky()) is None
    assert wish(Retry(after_s=2.5)) == RetryWish(2.5)
    assert wish(Retry(), "KeyError") == RetryWish()


def test_an_error_of_a_strange_class_is_not_retried() -> None:
    class Strange(type):
        def __getattribute__(cls, name: str) -> Any:
            raise RuntimeError("no")

    class Odd(Exception, metaclass=Strange): ...

    assert wish(Exception.__new__(Odd), "KeyError") is None


@given(
    st.integers(1, 10_000), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1), st.sampled_from([None, 0.0, 7.25])
)
def test_the_backoff_has_full_jitter_below_a_limit_that_doubles(
    attempts: int, backoff_s: float, more_s: float, luck: float, after_s: float | None
) -> None:
    spec = RetrySpec(max_attempts=10_000, backoff_s=backoff_s, max_backoff_s=backoff_s + more_s)
    bounds: list[tuple[float, float]] = []

    def uniform(least: float, most: float) -> float:
        bounds.append((least, most))
        return least + luck * (most - least)

    delay_s = RetryPolicy(spec, uniform).delay_s(attempts, RetryWish(after_s))
    if attempts == 10_000:
        assert delay_s is None
    elif after_s is not None:
        assert (delay_s, bounds) == (after_s, [])
    else:
        ((least, most),) = bounds
        assert least == 0
        assert most == pytest.approx(min(spec.max_backoff_s, backoff_s * 2.0 ** min(attempts - 1, 60)))
        assert delay_s is not None
        assert 0 <= delay_s <= most


def test_delays_are_random_and_spread_over_the_whole_range() -> None:
    policy = RetryPolicy(RetrySpec(backoff_s=1.0))
    delays = [policy.delay_s(1, RetryWish()) or 0.0 for _ in range(1_000)]
    assert min(delays) < 0.1 < 0.9 < max(delays) <= 1.0
    assert 0.4 < math.fsum(delays) / 1_000 < 0.6


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
def test_attempts_are_limited_whatever_the_code_asks_for(max_attempts: int) -> None:
    policy = RetryPolicy(RetrySpec(max_attempts=max_attempts))
    for asked in (RetryWish(), RetryWish(0.0)):
        allowed = [policy.delay_s(attempts, asked) is not None for attempts in range(1, 7)]
        assert allowed == [attempts < max_attempts for attempts in range(1, 7)]


def test_the_caller_gets_the_error_from_which_a_retry_was_raised() -> None:
    def raised(chain: str) -> BaseException:
        try:
            try:
                raise Flaky("the cause")
            except Flaky as e:
                if chain == "from":
                    raise Retry("again") from e
                if chain == "during":
                    raise Retry("again")  # noqa: B904 - as users write it
                raise Retry("again") from None
        except Retry as e:
            return shown_error(e)

    assert [type(raised(chain)) for chain in ("from", "during", "from None")] == [Flaky, Flaky, Retry]
    assert str(shown_error(Retry())) == "the code asked to be run again"
    other = KeyError("k")
    assert shown_error(other) is other


def test_a_retry_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(Retry("busy", after_s=3)))
    assert (str(copy), copy.after_s) == ("busy", 3)


@pytest.mark.parametrize("after_s", [-1, math.nan, math.inf, 24 * 3600 + 1])
def test_a_time_that_is_not_allowed_is_refused_where_it_is_given(after_s: float) -> None:
    with pytest.raises(ConfigError, match="after_s must be 0 to 86400 seconds, not"):
        Retry(after_s=after_s)


@pytest.mark.parametrize("after_s", ["5", True, [1]])
def test_a_time_that_is_not_a_number_is_a_type_error(after_s: Any) -> None:
    with pytest.raises(TypeError, match="after_s must be a number of seconds, not"):
        Retry(after_s=after_s)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ConectionError", "no exception class of that name is loaded; did you mean 'ConnectionError'?"),
        ("qqqqqqqq", "no exception class of that name is loaded; is it imported only when the code runs?"),
        ("asyncio.TimeOutError", "'asyncio' has no exception class of that name"),
        ("asyncio.Task", "'asyncio' has no exception class of that name"),
    ],
)
@pytest.mark.parametrize("may_be_elsewhere", [True, False])
def test_a_name_that_no_exception_has_is_refused(name: str, says: str, may_be_elsewhere: bool) -> None:
    with pytest.raises(ConfigError, match=f"RetryConfig.on has '{name}', and") as raised:
        check_names(["Exception", name], may_be_elsewhere=may_be_elsewhere)
    assert says in str(raised.value)


def test_a_module_that_is_missing_may_be_there_in_the_replicas() -> None:
    check_names(["no_such_module.Error", "no.such.Error"], may_be_elsewhere=True)
    for name in ("no_such_module.Error", "no.such.Error"):
        with pytest.raises(ConfigError, match="its module cannot be imported: No module named 'no"):
            check_names([name], may_be_elsewhere=False)


def test_a_module_is_imported_to_find_a_name() -> None:
    check_names(["xml.sax.SAXParseException", "sqlite3.OperationalError"], may_be_elsewhere=False)
