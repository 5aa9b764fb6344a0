"""The registry of an instance: backends, endpoints, traffic and the feed of their changes."""
