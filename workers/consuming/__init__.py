"""Consuming: claiming entries, starting them, and settling them."""
