"""Kept requests: submitted ones and those with an idempotency key, whose results stay in Redis."""
