"""The HTTP face of a caller: routing, conversion between HTTP and the wire, the HTTP server."""
