"""Log lines of replicas, proxies and the controller: one event each on stderr, as text or as a JSON object.

Ray keeps stderr in the log files of its workers, and sends it to the terminal of a script that started the instance.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple, cast

LEVEL_VARIABLE = "PENSTOCK_LOG_LEVEL"
"""Environment variable with the lowest level that is logged."""

FORMAT_VARIABLE = "PENSTOCK_LOG_FORMAT"
"""Environment variable with the format of log lines."""

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id", "taskName"}
"""Attributes that every record has. All others were given as ``extra``."""


class LogOptions(NamedTuple):
    """The logging of a process."""

    level: str = "INFO"
    format: Literal["text", "json"] = "text"

    @classmethod
    def from_environment(cls) -> LogOptions:
        """Return the options that the environment sets.

        Raises:
            ValueError: a variable has a value that is not allowed.
        """
        return cls(
            _choice(LEVEL_VARIABLE, LEVELS, cls().level, str.upper),
            cast(Any, _choice(FORMAT_VARIABLE, FORMATS, cls().format, str.lower)),
        )


def _choice(variable: str, allowed: tuple[str, ...], default: str, fold: Callable[[str], str]) -> str:
    given = os.environ.get(variable) or default
    if (value := fold(given)) not in allowed:
        raise ValueError(f"{variable} must be one of {', '.join(allowed)}, not {given!r}")
    return value


def set_up_logs(fields: Mapping[str, str]) -> None:
    """Log to stderr as the environment asks, unless logging is configured already.

    A value of the environment that is not allowed is logged, and its default is used.

    Args:
        fields: what every JSON object of this process contains, such as the tag of its replica.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    complaint: ValueError | None = None
    try:
        options = LogOptions.from_environment()
    except ValueError as e:
        options, complaint = LogOptions(), e
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(fields) if options.format == "json" else logging.Formatter(TEXT_FORMAT))
    root.addHandler(handler)
    root.setLevel(options.level)
    if complaint is not None:
        logging.getLogger(__name__).warning("%s", complaint)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object, with whatever was given as ``extra``."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := record.__dict__.get("request_id", "-")) != "-":
            line["request_id"] = request_id
        line.update(self._fields)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                line.setdefault(name, value)
        # An attached traceback is also the end of the message, for formats that show nothing else.
        if isinstance(traceback := line.get("traceback"), str):
            line["message"] = line["message"].removesuffix(f"\n{traceback}")
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except (TypeError, ValueError):  # an extra value that JSON cannot represent
            return json.dumps({name: str(value) for name, value in line.items()})
