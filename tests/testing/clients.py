"""Starlette's test client, which warns when it is imported that it would prefer another HTTP library."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient


__all__ = ["TestClient"]
