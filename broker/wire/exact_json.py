"""JSON without loss: orjson where it is exact, Python's ``json`` for the rest.

orjson reads integers beyond 64 bits as floats and refuses to write them; it refuses ``NaN``, ``1e400`` and lone
surrogates, which Python's ``json`` reads. All of Penstock reads and writes JSON with this module, so that a value means
the same over HTTP, through handles, in files and on the command line.

orjson's option for NumPy is used only where it is exact: arrays of dates with a NaT would become other dates, or
invalid JSON.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
from typing import Any, cast

import orjson

_COMPACTED_BYTES = 64 * 1024
"""Longer ones are not copied: of a large allocation, only what was written takes memory."""

_LONG_DIGITS = 19
"""Integers of fewer digits fit into 64 bits, so orjson reads them exactly."""
_LONG_NUMBER = b"0" * _LONG_DIGITS
_DIGITS = b"0123456789"
_DIGITS_AS_ZEROS = bytes(0x30 if byte in _DIGITS else 0x20 for byte in range(256))


def loads(raw: bytes) -> Any:
    """Return the same as ``json.loads``, usually in a fraction of the time.

    >>> loads(b'{"id": 123456789012345678901, "x": NaN}')
    {'id': 123456789012345678901, 'x': nan}

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer of more digits than
            ``sys.get_int_max_str_digits()`` allows.
    """
    if len(raw) < _LONG_DIGITS or not has_long_number(raw):
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dumps(value: object) -> bytes:
    """Return ``value`` as JSON: NaN, infinities and NaT as null, integers of any size exactly.

    Besides JSON values it takes tuples, dataclasses, enums, datetimes, UUIDs, pydantic models, NumPy arrays and
    scalars, and what has a ``tolist`` method, such as the tensors and series of other libraries.

    Raises:
        TypeError: JSON cannot hold the value, such as a mapping with a key that is not a string.
    """
    try:
        return orjson.dumps(value, _default)
    except TypeError:
        return _dump_exactly(value)


def compact(written: bytes) -> bytes:
    """Return what `dumps` or orjson has written, in as much memory as it needs; for bytes that are kept for a while.

    orjson allocates at least 4 KiB, and up to eight times of what it writes.
    """
    return b"%b" % written if len(written) <= _COMPACTED_BYTES else written


def name_of(kind: type[Any]) -> str:
    """Return the name of a type for messages: with its module, if that is not ``builtins``."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _default(value: Any) -> Any:
    """Return a replacement for a value that orjson cannot serialize. Raises `TypeError` if there is none."""
    if isinstance(value, tuple):  # a named one
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    # Recognised by their methods, so that none of the libraries needs to be imported.
    if not isinstance(value, type):
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return _convert_numpy(value, numpy)
        if (dump := getattr(value, "model_dump", None)) is not None:  # pydantic
            return dump(mode="json")
        if (to_list := getattr(value, "tolist", None)) is not None:
            return to_list()
        if type(value).__name__ == "NaTType":  # pandas
            return None
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
    raise TypeError(f"JSON cannot hold a {name_of(kind)}")


def _convert_numpy(value: Any, numpy: Any) -> Any:
    if value.ndim == 0:
        value = value[()]  # the only member of a 0-dimensional array
    kind: str = value.dtype.kind
    if kind == "M":
        if value.ndim > 1 or (value.ndim == 1 and numpy.isnat(value).any()):
            return list(value)
        if value.ndim == 0 and numpy.isnat(value):
            return None
    elif kind not in "biuf" or (value.ndim == 0 and value.dtype.char != "f"):
        item = value.tolist()
        if isinstance(item, numpy.generic):  # its type has no counterpart in Python
            raise TypeError(f"JSON cannot hold a {value.dtype.name}")
        return item
    elif not value.flags.c_contiguous or not value.dtype.isnative:
        return value.tolist()
    return orjson.Fragment(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def _dump_exactly(value: object) -> bytes:
    try:
        plain = _plain(value)
        try:
            return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:  # lone surrogates, which must be escaped
            return json.dumps(plain, separators=(",", ":")).encode()
    except RecursionError:
        raise TypeError("the value is nested too deeply, or contains itself") from None
    except ValueError as e:  # an integer of thousands of digits
        raise TypeError(str(e)) from None


def _plain(value: Any) -> Any:
    """Return ``value`` converted so that Python's ``json`` writes it as orjson would."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        mapping: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return {_key(key): _plain(member) for key, member in mapping.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in cast("list[Any]", value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in names}
    try:
        return loads(orjson.dumps(value))  # such as dates, UUIDs and `orjson.Fragment`
    except TypeError:
        return _plain(_default(value))


def _key(key: object) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    raise TypeError(
        f"JSON has only strings as keys, and a mapping has the key {key!r} ({type(key).__name__}): use str(key)"
    )


def has_long_number(raw: bytes) -> bool:
    """Return whether ``raw`` may contain a number with too many digits for orjson to read it exactly."""
    sample = raw[_LONG_DIGITS - 1 :: _LONG_DIGITS]  # includes a digit of each number of at least that length
    if len(sample) == len(sample.translate(None, _DIGITS)):
        return False
    return _LONG_NUMBER in raw.translate(_DIGITS_AS_ZEROS)
