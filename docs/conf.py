"""Settings of the documentation's site: the pages of this folder, and an API reference from the docstrings.

``make docs`` builds it into ``build/docs``. A warning fails the build: a link that leads nowhere, or a docstring that
is not well formed.
"""

from __future__ import annotations

import re
from importlib import import_module
from inspect import isclass, ismodule
from pathlib import Path
from pydoc import locate
from typing import Any

from pydantic import BaseModel
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

FOLDER = Path(__file__).parent

project = "Penstock"
copyright = "the authors of Penstock, under the Apache License 2.0"  # noqa: A001 - Sphinx names it
html_title = "Penstock"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"
html_copy_source = False
html_show_sphinx = False

# -- pages

myst_heading_anchors = 4  # links name a heading as they do on GitHub
myst_fence_as_directive = ["mermaid"]

# -- docstrings

default_role = "py:obj"  # a link where the name is documented, code elsewhere
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "model_config"}
maximum_signature_line_length = 100
napoleon_numpy_docstring = False

# -- contents

_SECTIONS = {
    "Using it": ["quickstart", "batches", "streaming", "deploying"],
    "Operating it": ["operations", "security", "tuning", "performance", "scaling"],
    "Reference": ["reference/serve", "reference/handles", "reference/errors"],
    "Working on it": ["architecture", "glossary", "decisions"],
}


def _contents() -> str:
    """Return one table of contents for each section. A page that no section names joins the first one."""
    named = {"index", *(page for pages in _SECTIONS.values() for page in pages)}
    others = sorted(file.stem for file in FOLDER.glob("*.md") if file.stem not in named)
    sections = {**_SECTIONS, "Using it": _SECTIONS["Using it"] + others}
    return "\n".join(_toctree(pages, f":caption: {section}") for section, pages in sections.items())


def _toctree(pages: list[str], option: str) -> str:
    return "\n".join(["```{toctree}", ":hidden:", option, "", *pages, "```", ""])


def _other_exports(page: str, text: str) -> str:
    """Return directives for the exports of a module that its page does not arrange."""
    module = import_module(f"penstock.{Path(page).name}")
    directives: list[str] = []
    for name in module.__all__:
        exported = getattr(module, name)
        if ismodule(exported) or re.search(rf"\b{name}$", text, re.MULTILINE) or _is_described_elsewhere(page, name):
            continue
        directives.append(f".. auto{'class' if isclass(exported) else 'function'}:: {name}\n")
    return "\n" + "\n".join(["Further names", "-------------", "", *directives]) if directives else ""


def _is_described_elsewhere(page: str, name: str) -> bool:
    return page == "reference/serve" and name in import_module("penstock.handles").__all__ and name != "connect"


def _complete_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Add to a page what only the site needs, so that it reads well without it."""
    if page == "index":
        source[0] += "\n" + _contents()
    elif page == "decisions":
        source[0] += "\n" + _toctree(["decisions/*"], ":glob:")
    elif page in ("reference/serve", "reference/handles"):
        source[0] += _other_exports(page, source[0])
    source[0] = re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)\)", lambda link: _within_site(page, link), source[0])


def _within_site(page: str, link: re.Match[str]) -> str:
    """Return a link to another page as it is, and the name of a file of the repository in place of a link to it."""
    text, target = link.groups()
    file = (FOLDER / page).parent.joinpath(target).resolve()
    if file.is_relative_to(FOLDER) or not file.is_file():
        return link.group()
    return f"{text} (`{file.relative_to(FOLDER.parent)}`)"


# -- attributes


class _Attributes:
    """Keeps the docstrings of attributes and properties from napoleon, which takes text before a colon for a type."""

    def __init__(self) -> None:
        self._kept: list[str] = []

    def keep(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "property"):
            self._kept = GoogleDocstring(lines, app.config, app, "function", name, obj, options).lines()
            lines.clear()

    def put_back(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "property"):
            lines[:] = [*self._kept, *_default(name)]


def _default(attribute: str) -> list[str]:
    """Return the default that the docstring of a configuration's field states."""
    owner, _, name = attribute.rpartition(".")
    model = locate(owner)
    if not (isclass(model) and issubclass(model, BaseModel)) or name not in model.model_fields:
        return []
    field = model.model_fields[name]
    if field.is_required():
        return ["*Required.*", ""]
    return [f"*Default:* ``{field.get_default(call_default_factory=True)!r}``", ""]


def setup(app: Sphinx) -> None:
    attributes = _Attributes()
    app.connect("source-read", _complete_page)
    app.connect("autodoc-process-docstring", attributes.keep, priority=400)
    app.connect("autodoc-process-docstring", attributes.put_back, priority=600)
    app.add_lexer("acl", TextLexer)
