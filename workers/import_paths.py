"""Import paths of code to deploy: ``"package.module:Name"``."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ..handles.errors import ConfigError

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def check_import_path(path: str) -> str:
    """Return ``path`` if it has the form of an import path. Raises `ConfigError`."""
    if _IMPORT_PATH.fullmatch(path) is None:
        raise ConfigError(f"the import path {path!r} must look like 'package.module:Name'")
    return path


def import_object(path: str) -> Any:
    """Import the module of ``path`` and return the object. Raises any error of the module."""
    module, colon, names = path.partition(":")
    if not (module and colon and names):
        raise ValueError(f"an import path is written 'module:Name', not {path!r}")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found
