"""Executing: loading user code, calling it, and making replies of its results."""
