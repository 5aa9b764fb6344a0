"""HTTP/1.1 on one connection: framing, pipelining, limits, and the fast path."""
