"""The command ``penstock``: one module for each of its commands."""

from .main import main

__all__ = ["main"]
