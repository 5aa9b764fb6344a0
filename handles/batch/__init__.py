"""Batch producers: many items through the queue of a backend, with results in order or as they finish."""
