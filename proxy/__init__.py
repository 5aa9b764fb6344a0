"""A handle with an HTTP face: routing, HTTP to wire and back, the HTTP server."""
