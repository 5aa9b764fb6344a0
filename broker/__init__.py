"""Everything that knows Redis: the wire format, keys, scripts, connection, streams, registry, embedded server."""
