"""Kept requests: their admission with an idempotency key, their results, and the space that these take."""
