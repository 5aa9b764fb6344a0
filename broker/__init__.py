"""The broker: all use of Redis, in layers (wire, transport, queue, registry), and the embedded server."""
