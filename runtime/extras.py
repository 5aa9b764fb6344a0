"""Missing packages: names the extra of ``penstock`` that installs them."""

from __future__ import annotations

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
