"""Types of columns that hold any JSON values: found out from all values of a column, and never lossy.

A column of values that no type holds exactly, such as text in one row and a list in another, is text that holds JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, cast

from ...broker.wire import exact_json

Kind = Literal["null", "bool", "int", "float", "text", "list", "object", "json"]

_EXACT_FLOAT = 2**53
"""Integers up to this size are exact as floats."""
_DECIMAL_DIGITS = 38


@dataclass(slots=True)
class ColumnType:
    """The type of the values of a column, so far."""

    kind: Kind = "null"
    least: int = 0
    most: int = 0
    """Of the integers."""
    members: ColumnType | None = None
    """Of lists."""
    fields: dict[str, ColumnType] = field(default_factory=dict[str, "ColumnType"])
    """Of objects, in the order in which they first came."""

    def add(self, value: Any) -> None:
        """Widen the type so that it holds ``value`` too."""
        kind = _kind_of(value)
        if self.kind == "json" or kind == "null":
            return
        if self.kind == "null":
            self.kind = kind
        elif {self.kind, kind} == {"int", "float"}:
            self.kind = "float"
        elif self.kind != kind:
            self.kind = "json"
            return
        if kind == "int":
            self.least, self.most = min(self.least, value), max(self.most, value)
        if self.kind == "float" and max(-self.least, self.most) > _EXACT_FLOAT:
            self.kind = "json"
        elif kind == "list":
            self.members = self.members or ColumnType()
            for member in value:
                self.members.add(member)
        elif kind == "object":
            for name, member in value.items():
                self.fields.setdefault(name, ColumnType()).add(member)

    @property
    def is_json(self) -> bool:
        """Whether the column is text that holds JSON."""
        if self.kind == "int":
            return not self._fits(64) and max(len(str(self.most)), len(str(-self.least))) > _DECIMAL_DIGITS
        return self.kind == "json" or (self.kind == "object" and not self.fields)

    def _fits(self, bits: int) -> bool:
        return (-(2 ** (bits - 1)) <= self.least and self.most < 2 ** (bits - 1)) or (
            self.least >= 0 and self.most < 2**bits
        )

    def to_arrow(self, pa: Any) -> Any:
        """Return the Arrow type; ``pa`` is the module pyarrow."""
        if self.is_json or self.kind in ("null", "text"):
            return pa.string()
        if self.kind == "bool":
            return pa.bool_()
        if self.kind == "float":
            return pa.float64()
        if self.kind == "list":
            return pa.list_((self.members or ColumnType()).to_arrow(pa))
        if self.kind == "object":
            return pa.struct([(name, inner.to_arrow(pa)) for name, inner in self.fields.items()])
        if not self._fits(64):
            return pa.decimal128(_DECIMAL_DIGITS, 0)
        return pa.int64() if self.most < 2**63 else pa.uint64()

    @property
    def needs_conversion(self) -> bool:
        """Whether pyarrow does not take the values as they are."""
        if self.is_json or (self.kind == "int" and not self._fits(64)):
            return True
        inner = [self.members] if self.members is not None else [*self.fields.values()]
        return any(one.needs_conversion for one in inner)

    def convert(self, value: Any) -> Any:
        """Return ``value`` as pyarrow takes it."""
        if value is None:
            return None
        if self.is_json:
            return exact_json.dumps(value).decode()
        if self.kind == "int":
            return value if self._fits(64) else Decimal(value)
        if self.kind == "list" and self.members is not None:
            return [self.members.convert(member) for member in value]
        if self.kind == "object":
            return {name: self.fields[name].convert(member) for name, member in value.items()}
        return value


def _kind_of(value: Any) -> Kind:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "text" if _is_utf8(value) else "json"
    if isinstance(value, Mapping):
        return "object" if all(map(_is_utf8, cast("Mapping[str, Any]", value))) else "json"
    return "list"


def _is_utf8(text: str) -> bool:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True
