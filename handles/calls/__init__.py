"""The client core: calls in flight, their replies, recovery after a lost connection, traffic."""
