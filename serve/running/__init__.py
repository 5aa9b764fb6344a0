"""``penstock run``: serves the backends of a script, a module or a manifest until it is interrupted; reloads them."""
