"""Process-level helpers that do not use Redis: memory and signals."""
