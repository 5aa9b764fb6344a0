"""Penstock serves Python functions and models from one durable queue per backend.

Processes that serve import ``penstock.serve``; those that only call import ``penstock.handles``. This module imports
nothing, so that neither pays for the other.
"""

__version__ = "0.1.0.dev0"
"""The version of the package; ``pyproject.toml`` reads it here."""
