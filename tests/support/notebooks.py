"""Texts of an object in a notebook: those of its tables and paragraphs."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


def shown_in_notebook(thing: Any) -> list[list[str]]:
    """Return the rows of the tables that Jupyter shows for ``thing``; a caption or a paragraph is a row of one cell."""
    page = _Page()
    page.feed(thing._repr_html_())
    page.close()
    assert page.open == [], f"elements are not closed: {page.open}"
    return page.rows


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        assert tag in ("table", "caption", "tr", "th", "td", "p"), f"an element comes from a value: {tag}"
        if tag in ("caption", "tr", "p"):
            self.rows.append([])
        if tag in ("caption", "th", "td", "p"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data
