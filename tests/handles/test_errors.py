import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock.handles import errors
from penstock.handles.errors import PenstockError, from_wire, to_wire

EXAMPLES: list[tuple[PenstockError, int, str]] = [
    (errors.BackendError("ValueError", "bad", "Traceback …"), 500, "ValueError: bad"),
    (errors.BackendError("HTTPException", "teapot", status=418), 418, "HTTPException: teapot"),
    (errors.BackendNotFound("b", ["a", "c"]), 404, "no backend 'b'; this instance has 'a', 'c'"),
    (errors.CallMethodRefused("e", "f", ["g", "h"]), 403, "endpoint 'e' offers the methods 'g', 'h', not 'f'"),
    (errors.EndpointNotFound("e"), 404, "no endpoint 'e'; this instance has no endpoints yet"),
    (errors.BrokerUnavailable("redis://h", "gone"), 503, "the broker at redis://h is unavailable: gone"),
    (errors.DeliveryLimitExceeded("b", "id", 3, 3), 500, "3"),
    (errors.MalformedBody("not JSON"), 400, "not JSON"),
    (
        errors.Overloaded("b", 10, 10, 2.5),
        503,
        "'b' has 10 unsettled requests (max_queued_requests is 10); retry in 2.5 s",
    ),
    (errors.Overloaded("b", 0, 10), 503, "the broker has no memory left"),
    (errors.PayloadTooLarge(11, 10), 413, "11 bytes or more (max_body_bytes is 10)"),
    (errors.PayloadTooLarge(11, 10, "the limit of Redis"), 413, "11 bytes or more (the limit of Redis is 10)"),
    (
        errors.BrokerRefused("READONLY no", "SET k", "redis://h", "alice"),
        503,
        "the broker at redis://h refused SET k: READONLY no",
    ),
    (
        errors.BrokerFull("no", "SET k", "redis://h", "alice"),
        503,
        "the broker at redis://h has no memory left for SET k",
    ),
    (
        errors.NotPermitted("no", "SET k", "redis://h", "alice"),
        500,
        "'alice' may not do SET k at redis://h: no (docs/security.md has the rules that each role needs)",
    ),
    (errors.NotPermitted("no", "SET k", "redis://h"), 500, "the Redis user 'default' may not do SET k"),
    (errors.RequestCancelled("id"), 499, "'id' was cancelled"),
    (errors.RequestTimeout("backend 'b'", 0.25), 504, "backend 'b' did not answer within 0.25 s"),
    (
        errors.StreamBroken("b", "id", "its replica died"),
        502,
        "the streamed reply of 'b' to request 'id' broke off: its replica died",
    ),
    (errors.IdempotencyConflict("e"), 422, "the idempotency key was used for another request to endpoint 'e'"),
    (errors.RequestNotFound(), 404, "there is no submitted request with this id"),
    (errors.ResultExpired("id"), 410, "the result of request 'id' has expired"),
    (errors.ResultsFull("b", 11, 10), 503, "results of 'b' take 11 bytes (max_result_bytes is 10)"),
    (errors.WireError("what is this"), 500, "what is this"),
    (errors.ConfigError("port must be …"), 400, "port must be …"),
    (PenstockError("anything"), 500, "anything"),
]
each_example = pytest.mark.parametrize(("error", "status", "message"), EXAMPLES, ids=lambda value: type(value).__name__)


def alike(one: BaseException, other: BaseException) -> bool:
    return (type(one), one.args, str(one), vars(one)) == (type(other), other.args, str(other), vars(other))


@each_example
def test_each_error_has_its_status_and_message(error: PenstockError, status: int, message: str) -> None:
    assert error.status == status
    assert message in str(error)


@each_example
def test_each_error_survives_pickling_and_copying(error: PenstockError, status: int, message: str) -> None:
    assert alike(pickle.loads(pickle.dumps(error)), error)
    assert alike(copy.copy(error), error)


@each_example
def test_each_error_survives_the_wire(error: PenstockError, status: int, message: str) -> None:
    arrived = from_wire(json.loads(json.dumps(to_wire(error))))
    if type(error) in (PenstockError, errors.ConfigError):
        assert message in str(arrived), "replicas do not send these; they are quoted"
    else:
        assert alike(arrived, error)


def test_all_errors_are_penstock_errors_and_the_fitting_builtin_errors() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(kind, PenstockError) for kind in kinds)
    assert {kind for kind, _, _ in [(type(error), 0, 0) for error, _, _ in EXAMPLES]} == set(kinds)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MalformedBody, ValueError)
    assert issubclass(errors.BackendNotFound, KeyError)
    assert issubclass(errors.EndpointNotFound, KeyError)
    assert issubclass(errors.RequestNotFound, KeyError)
    assert issubclass(errors.RequestTimeout, TimeoutError)


def test_an_error_of_a_later_release_is_quoted() -> None:
    for raw in ({"kind": "Brandnew", "args": [1]}, {"kind": "RequestTimeout", "args": [1, 2, 3, 4]}, {}):
        error = from_wire(raw)
        assert type(error) is PenstockError
        assert str(raw.get("kind")) in str(error)


@given(
    st.dictionaries(
        st.sampled_from(["kind", "args", "more"]),
        st.sampled_from(errors.__all__)
        | st.text()
        | st.lists(st.none() | st.integers() | st.text() | st.lists(st.text())),
    )
)
def test_garbage_instead_of_an_error_is_an_error_with_a_message(raw: dict[str, Any]) -> None:
    error = from_wire(raw)
    assert str(error)
    assert 100 <= error.status <= 599
    pickle.dumps(error)
