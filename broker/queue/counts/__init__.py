"""Counts of requests at the broker: the depth of a queue, and what callers saw end without a reply."""
