"""Arrow columns as JSON values, without loss: every cell is the value of its type, or names why it has none.

=========================  ==========================================================================
type                       value
=========================  ==========================================================================
bool, integers, floats     number or boolean; NaN and infinities are null, as everywhere
string                     text
binary                     text in base64
date, time                 text in ISO 8601: ``2026-11-27``, ``01:02:03.5``
timestamp                  text in ISO 8601; with a time zone, in UTC: ``2026-11-27T01:02:03+00:00``
duration                   text in ISO 8601, in seconds: ``PT1.5S``
decimal                    text with all its digits: ``12.50``
list, struct               array, object
map                        object, if its keys are text
dictionary, extension      the value that it stands for
=========================  ==========================================================================
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_EPOCH = datetime(1970, 1, 1)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_DAY_MS = 24 * 3600 * 1000


class NoValue:
    """Stands in a column for a cell that has no JSON value."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


Convert = Callable[[Any], list[Any]]
"""Returns the values of an Arrow array."""


class NoConversion(Exception):
    """JSON has no value for a type. Its text is the name of the type."""


def conversion(kind: Any, pa: Any) -> Convert:
    """Return a function that converts arrays of a type; ``pa`` is the module pyarrow.

    Raises:
        NoConversion: there is nothing that does.
    """
    types = pa.types
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return _plain
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _text
    if types.is_decimal(kind):
        return _each(lambda value: format(value, "f"))
    if types.is_date(kind):
        return _dates
    if types.is_timestamp(kind):
        return _timestamps
    if types.is_time(kind):
        return _times
    if types.is_duration(kind):
        return _durations
    if kind.num_fields and types.is_struct(kind):
        return _structs(kind, pa)
    if types.is_map(kind):
        return _maps(kind, pa)
    if types.is_dictionary(kind):
        inner = conversion(kind.value_type, pa)
        return lambda array: inner(array.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):
        if str(kind.extension_name) == "arrow.uuid":
            return _each(str)
        inner = conversion(kind.storage_type, pa)
        return lambda array: inner(array.storage)
    if types.is_fixed_size_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        as_list = pa.large_list(kind.value_type)
        inner = conversion(as_list, pa)
        return lambda array: inner(array.cast(as_list))
    if types.is_list(kind) or types.is_large_list(kind):
        return _lists(conversion(kind.value_type, pa))
    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    ):
        return _each(lambda value: b64encode(value).decode())
    raise NoConversion(str(kind))


def _plain(array: Any) -> list[Any]:
    values: list[Any] = array.to_pylist()
    return values


def _text(array: Any) -> list[Any]:
    try:
        return _plain(array)
    except UnicodeDecodeError:
        return [_text_of(cell) for cell in array]


def _text_of(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return NoValue("is not UTF-8")


def _each(convert: Callable[[Any], Any]) -> Convert:
    return lambda array: [None if value is None else convert(value) for value in array.to_pylist()]


def _dates(array: Any) -> list[Any]:
    days = str(array.type) == "date32[day]"
    numbers = array.view("int32" if days else "int64").to_pylist()
    return [None if number is None else _date(number if days else number // _DAY_MS) for number in numbers]


def _date(days: int) -> Any:
    try:
        return date.fromordinal(_EPOCH_DAY + days).isoformat()
    except (ValueError, OverflowError):
        return _no_year()


def _no_year() -> NoValue:
    return NoValue("is beyond the years 1 to 9999")


def _timestamps(array: Any) -> list[Any]:
    per_second, zone = _PER_SECOND[array.type.unit], "" if array.type.tz is None else "+00:00"

    def convert(number: int) -> Any:
        seconds, fraction = divmod(number, per_second)
        try:
            return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat()}{_fraction(fraction, per_second)}{zone}"
        except OverflowError:
            return _no_year()

    return [None if number is None else convert(number) for number in array.view("int64").to_pylist()]


def _times(array: Any) -> list[Any]:
    per_second = _PER_SECOND[array.type.unit]

    def convert(number: int) -> Any:
        seconds, fraction = divmod(number, per_second)
        if not 0 <= seconds < 24 * 3600:
            return NoValue("is not within a day")
        minutes, seconds = divmod(seconds, 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{_fraction(fraction, per_second)}"

    numbers = array.view("int32" if array.type.bit_width == 32 else "int64").to_pylist()
    return [None if number is None else convert(number) for number in numbers]


def _durations(array: Any) -> list[Any]:
    per_second = _PER_SECOND[array.type.unit]

    def convert(number: int) -> str:
        seconds, fraction = divmod(abs(number), per_second)
        return f"{'-' if number < 0 else ''}PT{seconds}{_fraction(fraction, per_second)}S"

    return [None if number is None else convert(number) for number in array.view("int64").to_pylist()]


def _fraction(fraction: int, per_second: int) -> str:
    """Return ``.5`` of 500 thousandths."""
    return "" if not fraction else f".{fraction:0{len(str(per_second)) - 1}}".rstrip("0")


def _lists(inner: Convert) -> Convert:
    def convert(array: Any) -> list[Any]:
        offsets: list[int] = array.offsets.to_pylist()
        first = offsets[0] if offsets else 0
        values = inner(array.values.slice(first, (offsets[-1] if offsets else 0) - first))
        is_null: list[bool] = array.is_null().to_pylist()
        return [
            None if null else values[start - first : end - first]
            for null, start, end in zip(is_null, offsets[:-1], offsets[1:], strict=True)
        ]

    return convert


def _structs(kind: Any, pa: Any) -> Convert:
    fields = [kind.field(at) for at in range(kind.num_fields)]
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        raise NoConversion(f"{kind}, which names a field twice")
    inner = [conversion(field.type, pa) for field in fields]

    def convert(array: Any) -> list[Any]:
        columns = [one(child) for one, child in zip(inner, array.flatten(), strict=True)]
        is_null: list[bool] = array.is_null().to_pylist()
        return [
            None if null else dict(zip(names, values, strict=True))
            for null, values in zip(is_null, zip(*columns, strict=True), strict=True)
        ]

    return convert


def _maps(kind: Any, pa: Any) -> Convert:
    if not (pa.types.is_string(kind.key_type) or pa.types.is_large_string(kind.key_type)):
        raise NoConversion(f"{kind}, whose keys are not text")
    pairs = pa.list_(pa.struct([pa.field("key", kind.key_type, False), pa.field("value", kind.item_type)]))
    as_lists = conversion(pairs, pa)

    def convert(array: Any) -> list[Any]:
        return [None if entries is None else _object_of(entries) for entries in as_lists(array.cast(pairs))]

    return convert


def _object_of(entries: list[dict[str, Any]]) -> Any:
    object_ = {entry["key"]: entry["value"] for entry in entries if not isinstance(entry["key"], NoValue)}
    return (
        object_ if len(object_) == len(entries) else NoValue("is a map with a key that is there twice, or is not UTF-8")
    )


def find_no_value(value: Any) -> NoValue | None:
    """Return the first cell within ``value`` that has no JSON value."""
    if isinstance(value, NoValue):
        return value
    members: Any = ()
    if value.__class__ is list:
        members = value
    elif value.__class__ is dict:
        members = value.values()
    return next((found for member in members if (found := find_no_value(member)) is not None), None)
