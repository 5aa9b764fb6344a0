import hashlib
from dataclasses import fields
from typing import Any

import orjson
import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from penstock.broker.registry.json_records import read_record
from penstock.broker.registry.records import AutoscalingSpec, BackendRecord, BackendSpec, RetrySpec
from penstock.handles.errors import ConfigError
from penstock.serve.config import AutoscalingConfig, BackendConfig, HTTPOptions, RetryConfig


def test_the_defaults_are_the_documented_ones() -> None:
    assert BackendConfig().model_dump() == {
        "num_replicas": 1,
        "max_batch_size": None,
        "batch_wait_timeout": 0.0,
        "max_concurrent_queries": None,
        "user_config": None,
        "autoscaling_config": None,
        "max_queued_requests": 10_000,
        "max_queued_bytes": 1024 * 1024 * 1024,
        "batch_share": 0.1,
        "max_deliveries": 3,
        "max_dead_letters": 10_000,
        "retry": None,
        "result_ttl_s": 3600.0,
        "max_result_bytes": 1024 * 1024 * 1024,
        "graceful_shutdown_timeout_s": 20.0,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "allow_pickle": False,
    }
    assert HTTPOptions().model_dump() == {
        "host": "127.0.0.1",
        "port": 8000,
        "middlewares": [],
        "location": "HeadOnly",
        "proxies_per_node": 1,
        "request_timeout_s": 60.0,
        "max_body_bytes": 64 * 1024 * 1024,
        "max_buffered_bytes": None,
        "max_connections": 10_000,
        "drain_delay_s": 5.0,
        "unready_after_s": 10.0,
        "root_path": "",
        "debug": False,
        "admin_port": None,
        "admin_host": "127.0.0.1",
        "admin_token": None,
        "ray_serve_metrics": False,
        "access_log": False,
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_replicas": "2"}, "BackendConfig.num_replicas must be a valid integer, not str"),
        ({"num_replicas": True}, "BackendConfig.num_replicas must be a valid integer, not bool"),
        ({"num_replicas": 2.0}, "BackendConfig.num_replicas must be a valid integer, not float"),
        ({"max_batch_size": "8"}, "BackendConfig.max_batch_size must be a valid integer, not str"),
        ({"batch_wait_timeout": "1"}, "BackendConfig.batch_wait_timeout must be a valid number, not str"),
        ({"allow_pickle": 1}, "BackendConfig.allow_pickle must be a valid boolean, not int"),
        ({"user_config": {"when": object()}}, "BackendConfig.user_config must be a JSON value"),
        ({"user_config": {1: "one"}}, "BackendConfig.user_config must be a JSON value"),
        ({"autoscaling_config": 3}, "BackendConfig.autoscaling_config must be"),
        ({"autoscaling_config": {"max_replicas": "4"}}, "AutoscalingConfig.max_replicas must be a valid integer"),
        ({"retry": 3}, "BackendConfig.retry must be"),
        ({"retry": {"max_attempts": "3"}}, "RetryConfig.max_attempts must be a valid integer, not str"),
        ({"retry": {"on": "ConnectionError"}}, "RetryConfig.on must be a list of names of exceptions, not str"),
        ({"retry": {"on": [ConnectionError]}}, "RetryConfig.on must be a valid string, not type"),
    ],
)
def test_a_field_of_a_wrong_type_is_a_type_error_that_names_it(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError) as raised:
        BackendConfig(**fields)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_replicas": 0}, "BackendConfig.num_replicas must be greater than or equal to 1, not 0"),
        ({"max_batch_size": 0}, "BackendConfig.max_batch_size must be greater than or equal to 1, not 0"),
        ({"batch_wait_timeout": -0.1}, "BackendConfig.batch_wait_timeout must be greater than or equal to 0, not -0.1"),
        ({"batch_wait_timeout": float("nan")}, "BackendConfig.batch_wait_timeout must be a finite number, not nan"),
        ({"health_check_period_s": 0}, "BackendConfig.health_check_period_s must be greater than 0, not 0"),
        ({"user_config": float("inf")}, "BackendConfig.user_config must be a JSON value"),
        ({"num_replica": 2}, "BackendConfig has no field 'num_replica'; did you mean 'num_replicas'?"),
        ({"colour": "red"}, "BackendConfig has no field 'colour'; its fields are num_replicas, max_batch_size,"),
        ({"autoscaling_config": {}}, "AutoscalingConfig.max_replicas must be given"),
        (
            {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}},
            "AutoscalingConfig.max_replicas must be at least min_replicas (3), not 2",
        ),
        ({"retry": {"max_attempts": 0}}, "RetryConfig.max_attempts must be greater than or equal to 1, not 0"),
        ({"retry": {"backoff_s": -1}}, "RetryConfig.backoff_s must be greater than or equal to 0, not -1"),
        ({"retry": {"backoff_s": 60}}, "RetryConfig.max_backoff_s must be at least backoff_s (60), not 30"),
        ({"retry": {"on": []}}, "RetryConfig.on must name at least one exception; retry=None turns retries off"),
        ({"retry": {"on": ["Key Error"]}}, "RetryConfig.on must hold names of exceptions, such as 'ConnectionError'"),
        ({"retry": {"attempts": 2}}, "RetryConfig has no field 'attempts'"),
    ],
)
def test_a_wrong_value_is_a_config_error_that_names_it_and_what_is_allowed(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        BackendConfig(**fields)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"port": 65536}, ConfigError, "HTTPOptions.port must be less than or equal to 65535, not 65536"),
        ({"port": "80"}, TypeError, "HTTPOptions.port must be a valid integer, not str"),
        ({"host": ""}, ConfigError, "HTTPOptions.host must have at least 1 character, not ''"),
        ({"location": "Here"}, ConfigError, "HTTPOptions.location must be 'HeadOnly', 'EveryNode' or 'NoServer'"),
        ({"middlewares": [GZipMiddleware]}, TypeError, "HTTPOptions.middlewares must be an instance of Middleware"),
        ({"root_path": "api/"}, ConfigError, "HTTPOptions.root_path must be empty, or start with '/'"),
        ({"request_timeout_s": 0}, ConfigError, "HTTPOptions.request_timeout_s must be greater than 0, not 0"),
        ({"max_body_bytes": -1}, ConfigError, "HTTPOptions.max_body_bytes must be greater than or equal to 0, not -1"),
        ({"admin_port": 8000}, ConfigError, "HTTPOptions.admin_port must differ from port (8000)"),
        (
            {"admin_token": "t" * 16},
            ConfigError,
            "HTTPOptions.admin_token is for the dashboard, which is on admin_port",
        ),
        (
            {"admin_port": 1, "admin_token": "short"},
            ConfigError,
            "HTTPOptions.admin_token must be at least 16 printable",
        ),
        ({"admin_port": 1, "admin_token": 7}, TypeError, "HTTPOptions.admin_token must be a valid string, not int"),
        ({"max_connections": 0}, ConfigError, "HTTPOptions.max_connections must be greater than or equal to 1, not 0"),
    ],
)
def test_http_options_are_validated(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as raised:
        HTTPOptions.parse(options)
    assert says in str(raised.value)


def test_of_an_admin_token_only_the_digest_is_kept() -> None:
    token = "correct-horse-battery-staple"
    options = HTTPOptions(admin_port=9000, admin_token=token)
    assert options.admin_token == f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    assert token not in f"{options!r} {options.model_dump()}"
    assert HTTPOptions(**options.model_dump()) == options
    assert HTTPOptions(admin_port=9000, admin_token=options.admin_token) == options


def test_a_location_of_none_means_no_server() -> None:
    assert HTTPOptions.parse({"location": None}).location == "NoServer"


def test_middlewares_are_those_of_starlette() -> None:
    options = HTTPOptions(middlewares=[Middleware(GZipMiddleware, minimum_size=10)])
    assert options.middlewares[0].kwargs == {"minimum_size": 10}


@pytest.mark.parametrize("config", [None, {}, BackendConfig()])
def test_a_config_may_be_left_out_or_be_a_mapping_or_a_model(config: Any) -> None:
    assert BackendConfig.parse(config) == BackendConfig()


@pytest.mark.parametrize("config", [3, "num_replicas", [("num_replicas", 2)], HTTPOptions(), {3: 4}])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="config"):
        BackendConfig.parse(config)


def test_an_update_keeps_the_other_fields() -> None:
    config = BackendConfig(num_replicas=3, autoscaling_config=AutoscalingConfig(max_replicas=4))
    updated = config.merged({"max_batch_size": 8, "autoscaling_config": {"min_replicas": 2}})
    assert updated == BackendConfig(
        num_replicas=3, max_batch_size=8, autoscaling_config=AutoscalingConfig(min_replicas=2, max_replicas=4)
    )
    assert config.merged(BackendConfig(max_batch_size=8)).num_replicas == 3
    assert config.merged({"autoscaling_config": None}).autoscaling_config is None
    assert config.merged(None) == config


def test_an_update_is_validated_as_a_whole() -> None:
    config = BackendConfig(autoscaling_config=AutoscalingConfig(max_replicas=4))
    with pytest.raises(ConfigError, match=r"at least min_replicas \(9\), not 4"):
        config.merged({"autoscaling_config": {"min_replicas": 9}})
    with pytest.raises(TypeError, match="num_replicas"):
        config.merged({"num_replicas": "2"})


def test_an_update_of_retries_keeps_their_other_fields_and_none_turns_them_off() -> None:
    config = BackendConfig(retry=RetryConfig(max_attempts=5, on=("KeyError",)))
    assert config.merged({"retry": {"backoff_s": 2}}).retry == RetryConfig(
        max_attempts=5, on=("KeyError",), backoff_s=2
    )
    assert config.merged({"num_replicas": 2}).retry == config.retry
    assert config.merged({"retry": None}).retry is None
    assert BackendConfig().merged({"retry": {"on": ["KeyError"]}}).retry == RetryConfig(on=("KeyError",))


def test_a_configuration_is_the_same_after_it_was_a_record() -> None:
    config = BackendConfig(num_replicas=3, user_config={"a": [1]}, autoscaling_config=AutoscalingConfig(max_replicas=4))
    assert BackendConfig.of_spec(config.spec()) == config
    retrying = BackendConfig.parse({"retry": {"on": ["KeyError", "a.B"], "backoff_s": 1}})
    assert BackendConfig.of_spec(retrying.spec()) == retrying
    record = BackendRecord(tag="f", version="1", code="", config=retrying.spec())
    assert read_record(BackendRecord, "f", orjson.loads(orjson.dumps(record))) == record


def test_a_configuration_has_the_fields_and_the_defaults_of_the_record() -> None:
    assert BackendConfig().spec() == BackendSpec()
    scaled = BackendConfig(autoscaling_config=AutoscalingConfig(max_replicas=2)).spec()
    assert scaled.autoscaling_config == AutoscalingSpec(max_replicas=2)
    assert BackendConfig.parse({"retry": {}}).spec().retry == RetrySpec()
    assert set(BackendConfig.model_fields) == {field.name for field in fields(BackendSpec)}


def test_a_user_config_is_a_copy() -> None:
    weights = [1, 2]
    config = BackendConfig(user_config={"weights": weights})
    weights.append(3)
    assert config.user_config == {"weights": [1, 2]}


@pytest.mark.parametrize(("num_replicas", "begins_with"), [(1, 2), (3, 3), (9, 4)])
def test_with_autoscaling_num_replicas_is_the_initial_number(num_replicas: int, begins_with: int) -> None:
    bounds = AutoscalingConfig(min_replicas=2, max_replicas=4)
    assert BackendConfig(num_replicas=num_replicas, autoscaling_config=bounds).spec().initial_replicas == begins_with
    assert BackendConfig(num_replicas=num_replicas).spec().initial_replicas == num_replicas


def test_max_buffered_bytes_below_max_body_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_buffered_bytes must be at least max_body_bytes \(67108864\), not 1000"):
        HTTPOptions(max_buffered_bytes=1000)
    assert HTTPOptions(max_buffered_bytes=1000, max_body_bytes=1000).max_buffered_bytes == 1000
