"""``penstock node``: a node of a Ray cluster that drains before it ends."""
