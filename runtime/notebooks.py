"""Display of objects in notebooks: HTML tables, which Jupyter shows instead of a ``repr``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_CELL = "text-align: left; white-space: pre-wrap"
"""Without it, notebooks align cells to the right."""


class NotebookTable:
    """Base class of objects that a notebook shows as a table of names and values."""

    __slots__ = ()

    def _notebook_fields(self) -> Mapping[str, object]:
        """Return what the table shows: text as it is, of everything else its ``repr``. No secrets, and no I/O."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return fields_html(type(self).__name__, self._notebook_fields())


def fields_html(title: str, fields: Mapping[str, object]) -> str:
    """Return a table with a row for each field.

    >>> fields_html("Handle", {"endpoint": "a<b"}).count("a&lt;b")
    1
    """
    rows = (f"<tr>{_cell('th', name)}{_cell('td', _text(value))}</tr>" for name, value in fields.items())
    return f"<table><caption>{escape(title)}</caption>{''.join(rows)}</table>"


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a head."""
    lines = [("th", head), *(("td", row) for row in rows)]
    return f"<table>{''.join(f'<tr>{_cells(tag, cells)}</tr>' for tag, cells in lines)}</table>"


def paragraph_html(text: str) -> str:
    """Return text with its line breaks."""
    return f'<p style="white-space: pre-wrap">{escape(text)}</p>'


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(_cell(tag, cell) for cell in cells)


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="{_CELL}">{escape(text)}</{tag}>'


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
