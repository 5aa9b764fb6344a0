"""Missing packages: names the extra of ``penstock`` that installs them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_PACKAGES = {
    "cli": ("click", "rich"),
    "serve": (
        *(
            "httptools",
            "multipart",
            "pathspec",
            "pydantic",
            "pydantic_core",
            "python_multipart",
            "ray",
            "starlette",
            "uvicorn",
        ),
        *("uvloop", "virtualenv", "yaml"),
    ),
}
"""The packages of each extra, by the names under which they are imported."""


def explain(error: ModuleNotFoundError, what: str) -> str | None:
    """Return a message that names the extra whose package is missing; None if it is not a package of an extra.

    Args:
        error: the error of the import.
        what: what needs the package; the message begins with it.

    >>> explain(ModuleNotFoundError("No module named 'ray'", name="ray"), "penstock.serve")
    "penstock.serve needs the package ray: pip install 'penstock[serve]'"
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in _PACKAGES.items():
        if package in packages:
            return f"{what} needs the package {package}: pip install 'penstock[{extra}]'"
    return None


def needed(module: str, what: str) -> ModuleType:
    """Import a module of an extra.

    Args:
        module: the absolute name of the module.
        what: what needs it.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        if (message := explain(e, what)) is None:
            raise
        raise ModuleNotFoundError(message, name=e.name, path=e.path) from None
