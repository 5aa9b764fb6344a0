"""Packages of the extra ``penstock[files]``, imported only when a file needs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import ConfigError


def import_optional(module: str, purpose: str) -> Any:
    """Return ``module``.

    Raises:
        ConfigError: its package is not installed; the message begins with ``purpose`` and names the extra.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as e:
        if e.name is not None and e.name.partition(".")[0] != package:
            raise  # the package is there, and lacks something itself
        raise ConfigError(f"{purpose} needs the package {package}: pip install 'penstock[files]'") from None
