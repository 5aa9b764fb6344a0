"""Wire formats: requests, replies, keys and entry refs. No I/O."""
