"""Everything that knows Redis, in layers: wire, transport, queue, registry; and the embedded server."""
