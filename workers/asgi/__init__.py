"""ASGI applications as backends: their lifespan in a replica, and the requests that they receive."""
