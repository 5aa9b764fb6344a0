"""Client core: publishes calls, receives their replies, and recovers them after a lost connection."""
