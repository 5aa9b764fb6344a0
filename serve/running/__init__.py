"""``penstock run``: serves what a script, a module or a manifest makes until it is interrupted, and reloads it."""
