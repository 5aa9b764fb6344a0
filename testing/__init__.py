"""Testing of user code without Ray and Redis: a backend, its handles and its HTTP in the process of the test."""

from .local import Local, local

__all__ = ["Local", "local"]
