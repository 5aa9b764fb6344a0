"""Log lines as text and as JSON, in processes of their own, because logging is configured once in a process."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from penstock.runtime.logs import JsonFormatter, LogOptions

SETTING_UP = """
import logging
from penstock.handles.log_context import NamedWork, set_up_logs, working_on
set_up_logs(backend="greeter", replica="greeter#1")
with working_on([NamedWork("r1")]):
    logging.debug("details")
    logging.info("hello %s", "you", extra={"user": 7})
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("app").exception("it failed")
"""


def lines(**environment: str) -> list[str]:
    """Return what a process logs that is set up with these variables."""
    command = [sys.executable, "-c", SETTING_UP]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return ran.stderr.splitlines()


def test_info_is_logged_by_default_with_the_id_of_its_request() -> None:
    logged = lines()
    assert logged[0].endswith("INFO root [r1] hello you")
    assert logged[1].endswith("ERROR app [-] it failed")
    assert logged[-1] == "ZeroDivisionError: division by zero"


def test_the_level_is_that_of_the_environment() -> None:
    assert "DEBUG root [r1] details" in lines(PENSTOCK_LOG_LEVEL="debug")[0]
    assert lines(PENSTOCK_LOG_LEVEL="CRITICAL") == []


def test_each_event_is_one_json_object() -> None:
    said, failed = map(json.loads, lines(PENSTOCK_LOG_FORMAT="json"))
    assert said.pop("time").endswith("Z")
    assert said == {
        "level": "INFO",
        "logger": "root",
        "message": "hello you",
        "request_id": "r1",
        "backend": "greeter",
        "replica": "greeter#1",
        "user": 7,
    }
    assert "ZeroDivisionError" in failed["traceback"]
    assert "request_id" not in failed


def test_a_value_that_is_not_allowed_is_logged_and_ignored() -> None:
    logged = lines(PENSTOCK_LOG_LEVEL="LOUD")
    assert "PENSTOCK_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not 'LOUD'" in logged[0]
    assert logged[1].endswith("hello you")


def test_the_options_name_the_variable_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_LOG_FORMAT", "xml")
    with pytest.raises(ValueError, match="PENSTOCK_LOG_FORMAT must be one of text, json, not 'xml'"):
        LogOptions.from_environment()


@pytest.mark.parametrize("value", [float("nan"), {1: 2, None: 3}, {("a",): 1}, object(), "\ud800", b"x"])
def test_any_extra_value_leaves_a_json_object(value: object) -> None:
    record = logging.makeLogRecord({"msg": "m", "levelname": "INFO", "value": value})
    found: Any = json.loads(JsonFormatter({}).format(record), parse_constant=lambda name: pytest.fail(name))
    assert found["message"] == "m"
    assert "value" in found
