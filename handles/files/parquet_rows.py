"""Rows of Parquet files, one batch of a row group at a time, so that memory does not depend on how large these are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from shutil import copyfileobj
from typing import Any, BinaryIO

from ...broker.wire import exact_json
from ..errors import ConfigError, MalformedBody
from .arrow_values import Convert, NoConversion, conversion, find_no_value
from .json_lines import too_large
from .optional import import_optional
from .sources import named

SIGNATURE = b"PAR1"
BATCH_ROWS = 1024
"""Rows that are decoded at a time."""
_BUFFER_BYTES = 256 * 1024
"""How much of each column is read ahead."""


class ParquetRows:
    """The rows of one Parquet file.

    Args:
        file: it.
        shown: its name, for errors.
        can_seek: it can be read from any position. Else, as a pipe, it is first copied to a temporary file.
        columns: which of its columns are read, in this order; None is all.
        max_bytes: a longer row is an error.

    Raises:
        ConfigError: pyarrow is not installed; a column is missing, named twice, or of a type without a value in JSON.
        OSError: it cannot be read.
        ValueError: it is not a Parquet file.
    """

    def __init__(
        self,
        file: BinaryIO,
        shown: str,
        *,
        can_seek: bool,
        columns: Sequence[str] | None,
        max_bytes: int,
        batch_rows: int = BATCH_ROWS,
        as_arrow: bool = False,
    ) -> None:
        purpose = f"{shown} is a Parquet file, and reading it"
        self._pa = pa = import_optional("pyarrow", purpose)
        parquet = import_optional("pyarrow.parquet", purpose)
        self._shown, self._max_bytes, self._batch_rows = shown, max_bytes, batch_rows
        self._copy = None if can_seek else _copy(file)
        try:
            # Without `pre_buffer`, which reads whole row groups.
            self._file = parquet.ParquetFile(
                file if self._copy is None else self._copy, pre_buffer=False, buffer_size=_BUFFER_BYTES
            )
        except pa.ArrowInvalid as e:
            self.close()
            raise ValueError(f"{shown}: it is not a Parquet file: {e}") from None
        except Exception as e:
            self.close()
            raise named(e, shown) from None
        self.rows: int = self._file.metadata.num_rows
        schema = self._file.schema_arrow
        try:
            self._columns = self._chosen(list(schema.names), columns)
            self._convert: list[Convert] = (
                [] if as_arrow else [self._conversion(schema.field(n)) for n in self._columns]
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()

    def _chosen(self, names: list[str], columns: Sequence[str] | None) -> list[str]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{self._shown}: it names more than one column {', '.join(map(repr, twice))}")
        if columns is None:
            return names
        if unknown := [name for name in columns if name not in names]:
            raise ConfigError(
                f"{self._shown}: there is no column {', '.join(map(repr, unknown))}; its columns are "
                f"{', '.join(map(repr, names))}"
            )
        return list(columns)

    def _conversion(self, field: Any) -> Convert:
        try:
            return conversion(field.type, self._pa)
        except NoConversion as e:
            raise ConfigError(
                f"{self._shown}: column {field.name!r} is of the type {e}, which has no value in JSON: name the "
                "columns to read, without it, by --columns (columns=[…])"
            ) from None

    def batches(self) -> Iterator[Any]:
        """Yield Arrow record batches."""
        # A projection by name would take "a.b" for the member "b" of a column "a".
        names = None if len(self._columns) == len(self._file.schema_arrow) else self._columns
        batches = self._file.iter_batches(batch_size=self._batch_rows, columns=names, use_threads=False)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as e:  # Arrow raises its own kinds for what is broken
                raise named(e, self._shown) from None
            yield batch.select(self._columns)

    def __iter__(self) -> Iterator[Any]:
        """Yield an object for each row; an exception stands for a row that has no JSON value."""
        names = self._columns
        for batch in self.batches():
            columns = [convert(column) for convert, column in zip(self._convert, batch.columns, strict=True)]
            may_be_large = batch.nbytes > self._max_bytes
            rows = zip(*columns, strict=True) if columns else ((),) * batch.num_rows
            for values in rows:
                row = dict(zip(names, values, strict=True))
                yield self._checked(row, may_be_large=may_be_large)

    def _checked(self, row: dict[str, Any], *, may_be_large: bool) -> Any:
        for name, value in row.items():
            if value.__class__ not in _CERTAIN and (found := find_no_value(value)) is not None:
                return MalformedBody(f"column {name!r} {found.reason}, so that the row has no value in JSON")
        if may_be_large and (size := len(exact_json.dumps(row))) > self._max_bytes:
            return too_large(size, self._max_bytes)
        return row


_CERTAIN = frozenset((type(None), bool, int, float, str))
"""Values that need not be looked into."""


def _copy(file: BinaryIO) -> Any:
    copy = tempfile.TemporaryFile(prefix="penstock-")  # noqa: SIM115 - closed by `close`
    try:
        copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy
