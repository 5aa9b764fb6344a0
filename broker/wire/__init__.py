"""The formats on the wire: requests, replies, keys and entry references. No I/O."""
