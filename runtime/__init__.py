"""Process-level helpers that know nothing of Redis: memory and signals."""
