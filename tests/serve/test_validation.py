import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock.broker.transport.url import MAX_MEMORY
from penstock.handles.errors import BackendNotFound, ConfigError
from penstock.serve.config import BackendConfig
from penstock.serve.validation import (
    ALL_METHODS,
    check_actor_options,
    check_call_methods,
    check_callable,
    check_fits,
    check_memory,
    check_methods,
    check_proportion,
    check_runtime_env,
    check_traffic,
)


def takes_one(request: object) -> object:
    return request


def takes_none() -> None: ...


def takes_two(request: object, other: object) -> None: ...


def takes_one_and_more(request: object, other: int = 1, *args: int, **kwargs: int) -> None: ...


class Model:
    def __init__(self, path: str, *, size: int = 1) -> None: ...

    def __call__(self, request: object) -> None: ...

    def reconfigure(self, user_config: object) -> None: ...


class Static:
    @staticmethod
    def __call__(request: object) -> None: ...


class Inherits(Model): ...


class WithoutCall:
    def predict(self, request: object) -> None: ...


class CallsWithoutRequest:
    def __call__(self) -> None: ...


class Meta(type):
    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args)


class OfAMetaclass(metaclass=Meta):
    def predict(self, request: object) -> None: ...


def test_methods_are_case_insensitive_and_repetitions_are_removed() -> None:
    assert check_methods(["get", "POST", "Get"]) == ("GET", "POST")
    assert check_methods({"delete"}) == ("DELETE",)


@pytest.mark.parametrize("methods", ["GET", None, 3, [3], [b"GET"]])
def test_methods_of_a_wrong_type_are_refused(methods: Any) -> None:
    with pytest.raises(TypeError, match="methods must be"):
        check_methods(methods)


@pytest.mark.parametrize("methods", [[], ["GTE"], ["GET", ""], ["GET "]])
def test_unknown_methods_are_refused(methods: list[str]) -> None:
    with pytest.raises(ConfigError, match=", ".join(ALL_METHODS)):
        check_methods(methods)


def test_call_methods_keep_their_order_and_repetitions_are_removed() -> None:
    assert check_call_methods(None) is None
    assert check_call_methods(["predict", "__call__", "predict"]) == ("predict", "__call__")


@pytest.mark.parametrize("names", ["predict", 3, [3], [b"predict"], [None]])
def test_call_methods_of_a_wrong_type_are_refused(names: Any) -> None:
    with pytest.raises(TypeError, match="must be a"):
        check_call_methods(names)


@pytest.mark.parametrize("names", [[], ["_private"], ["__init__"], ["a b"], [""], ["reconfigure"], ["check_health"]])
def test_call_methods_that_cannot_be_called_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError):
        check_call_methods(names)


@given(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=8).filter(any))
def test_weights_that_sum_to_one_within_rounding_are_accepted(parts: list[float]) -> None:
    weights = {f"backend{i}": part / math.fsum(parts) for i, part in enumerate(parts)}
    assert check_traffic(weights, weights) == {tag: weight for tag, weight in weights.items() if weight}


def test_a_weight_of_0_is_allowed_and_removed() -> None:
    assert check_traffic({"old": 0, "new": 1}, ["old", "new"]) == {"new": 1.0}


@pytest.mark.parametrize(
    ("traffic", "says"),
    [
        ({"a": 0.5, "b": 0.6}, "the weights {'a': 0.5, 'b': 0.6} must sum to 1; they sum to 1.1"),
        ({}, "the weights {} must sum to 1; they sum to 0"),
        ({"a": 0.99999}, "they sum to 0.99999"),
        ({"a": 1.5, "b": -0.5}, "the weight of 'b' must not be negative; it is -0.5"),
        ({"a": math.nan}, "the weight of 'a' must be finite, not nan"),
        ({"a": math.inf}, "the weight of 'a' must be finite, not inf"),
    ],
)
def test_invalid_weights_are_refused(traffic: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_traffic(traffic, ["a", "b"])
    assert says in str(raised.value)


@pytest.mark.parametrize("traffic", ["a", [("a", 1)], None, {"a": "1"}, {"a": True}, {3: 1}])
def test_traffic_of_a_wrong_type_is_refused(traffic: Any) -> None:
    with pytest.raises(TypeError):
        check_traffic(traffic, ["a"])


def test_traffic_to_an_unknown_backend_names_it_and_the_known_ones() -> None:
    with pytest.raises(BackendNotFound, match="no backend 'c'; this instance has 'a', 'b'"):
        check_traffic({"c": 1}, ["b", "a"])


def test_a_proportion_is_a_number_from_0_to_1() -> None:
    assert check_proportion(0) == 0.0
    assert check_proportion(0.25) == 0.25
    with pytest.raises(ConfigError, match=r"proportion must be 0 to 1, not 1\.5"):
        check_proportion(1.5)
    with pytest.raises(TypeError, match="proportion must be a number, not str"):
        check_proportion("half")


@pytest.mark.parametrize("target", [takes_one, takes_one_and_more, Static, functools.partial(takes_two, 1), repr])
def test_code_that_accepts_one_request_can_serve(target: Any) -> None:
    check_callable(target, (), {}, takes_batch=False)


@pytest.mark.parametrize("kind", [Model, Inherits])
def test_arguments_must_fit_the_constructor(kind: type) -> None:
    check_callable(kind, ("path",), {"size": 2}, takes_batch=False)
    with pytest.raises(TypeError, match=f"the constructor of {kind.__name__} does not accept .*missing .* 'path'"):
        check_callable(kind, (), {}, takes_batch=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        check_callable(kind, ("path",), {"colour": 2}, takes_batch=False)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (takes_none, "takes_none must take one request; its signature is ()"),
        (takes_two, "takes_two must take one request; its signature is (request: object, other: object)"),
        (WithoutCall, "the class WithoutCall must have a method __call__ that takes one request"),
        (OfAMetaclass, "the class OfAMetaclass must have a method __call__ that takes one request"),
        (CallsWithoutRequest, "CallsWithoutRequest.__call__ must take one request; its signature is ()"),
        (
            Model("x"),
            "a backend must be a function, a class, serve.asgi(app) or an import path 'module:Name', not Model",
        ),
        (None, "not NoneType"),
        (3, "not int"),
    ],
)
def test_code_that_cannot_serve_is_refused(target: Any, says: str) -> None:
    with pytest.raises(TypeError) as raised:
        check_callable(target, (), {}, takes_batch=False)
    assert says in str(raised.value)


def test_a_function_has_no_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="only a class is constructed with arguments; takes_one is a function"):
        check_callable(takes_one, (1,), {}, takes_batch=False)


def test_messages_about_batches_mention_a_list_of_requests() -> None:
    with pytest.raises(TypeError, match="takes_none must take one list of requests"):
        check_callable(takes_none, (), {}, takes_batch=True)


@pytest.mark.parametrize("path", ["module:Name", "package.module:Outer.Inner", "m_1:f"])
def test_the_code_of_an_import_path_is_not_checked(path: str) -> None:
    check_callable(path, (1,), {"x": 2}, takes_batch=False)


@pytest.mark.parametrize("path", ["", "module", "module.Name", "module:", ":Name", "a b:Name", "module:Na-me", "a:b:c"])
def test_a_malformed_import_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"must look like 'package\.module:Name'"):
        check_callable(path, (), {}, takes_batch=False)


@pytest.mark.parametrize("target", [takes_one, Model])
def test_a_batch_size_needs_code_that_accepts_batches(target: Callable[..., Any]) -> None:
    config = BackendConfig(max_batch_size=8)
    check_fits(config, target, takes_batch=True)
    with pytest.raises(ConfigError, match=r"max_batch_size is 8, but \w+ takes one request: mark it with @serve"):
        check_fits(config, target, takes_batch=False)


def test_a_user_config_needs_a_method_reconfigure() -> None:
    config = BackendConfig(user_config={"threshold": 0.5})
    check_fits(config, Model, takes_batch=False)
    check_fits(config, "module:Name", takes_batch=False)
    for target in (takes_one, Static):
        with pytest.raises(ConfigError, match=r"user_config is given, but \w+ has no method reconfigure"):
            check_fits(config, target, takes_batch=False)


def test_a_retry_of_an_error_that_does_not_exist_is_refused_where_the_code_is_at_hand() -> None:
    config = BackendConfig.parse({"retry": {"on": ["KeyError", "ConectionError"]}})
    with pytest.raises(ConfigError, match=r"RetryConfig.on has .ConectionError., and .* mean .ConnectionError."):
        check_fits(config, takes_one, takes_batch=False)
    check_fits(config, "module:Name", takes_batch=False)
    elsewhere = BackendConfig.parse({"retry": {"on": ["only_in_the_replicas.Error", "OSError"]}})
    check_fits(elsewhere, takes_one, takes_batch=False)


def test_actor_options_are_the_resources_of_ray() -> None:
    options = {"num_cpus": 0.5, "num_gpus": 2, "memory": 1e9, "resources": {"disk": 1.5}, "accelerator_type": "A100"}
    assert check_actor_options(options) == options
    assert check_actor_options(None) == {}
    assert check_actor_options({"num_cpus": None}) == {}


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        (
            {"num_cpu": 1},
            ConfigError,
            "num_cpus, num_gpus, memory, resources, accelerator_type, not 'num_cpu'",
        ),
        ({"name": "mine"}, ConfigError, "not 'name'"),
        ({"num_cpus": -1}, ConfigError, "num_cpus must not be negative; it is -1"),
        ({"num_cpus": "1"}, TypeError, "num_cpus must be a number, not str"),
        ({"num_gpus": 1.5}, ConfigError, "num_gpus must be a whole number above 1, not 1.5"),
        ({"resources": {"CPU": 1}}, ConfigError, "resources must not contain 'CPU'"),
        ({"resources": ["disk"]}, TypeError, "resources must be a dict of amounts by name, not list"),
        ({"resources": {"disk": True}}, TypeError, "the resource 'disk' must be a number, not bool"),
        ({"accelerator_type": 3}, TypeError, "accelerator_type must be a str, not int"),
        ([], TypeError, "ray_actor_options must be a dict, not list"),
    ],
)
def test_other_actor_options_are_refused(options: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as raised:
        check_actor_options(options)
    assert says in str(raised.value)


def test_a_runtime_env_is_a_dict() -> None:
    assert check_runtime_env(None) is None
    assert check_runtime_env({"pip": ["x"]}) == {"pip": ["x"]}
    with pytest.raises(TypeError, match="runtime_env must be a dict, not str"):
        check_runtime_env("env.yaml")
    with pytest.raises(TypeError, match="working_dir of runtime_env must be a str or a Path, not int"):
        check_runtime_env({"working_dir": 7})
    with pytest.raises(TypeError, match="py_modules of runtime_env must be a list, not str"):
        check_runtime_env({"py_modules": "here"})


def test_the_memory_limit_is_the_argument_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(MAX_MEMORY, raising=False)
    assert check_memory(None, None) is None
    monkeypatch.setenv(MAX_MEMORY, "33554432")
    assert check_memory(None, None) == 33_554_432
    assert check_memory(None, 67_108_864) == 67_108_864
    assert check_memory("redis://elsewhere", None) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1gb", "PENSTOCK_MAX_MEMORY_BYTES must be a number of bytes, not '1gb'"),
        ("-1", "PENSTOCK_MAX_MEMORY_BYTES must be a number of bytes, not '-1'"),
        ("1024", "PENSTOCK_MAX_MEMORY_BYTES must be at least 16777216 bytes, not 1024"),
    ],
)
def test_an_invalid_memory_limit_in_the_environment_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.setenv(MAX_MEMORY, text)
    with pytest.raises(ConfigError, match=says):
        check_memory(None, None)
