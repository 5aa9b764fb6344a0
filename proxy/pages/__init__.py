"""Pages of the proxy itself, below ``/-/``: routes, health, metrics, and submitted requests."""
