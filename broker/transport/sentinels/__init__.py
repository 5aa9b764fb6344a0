"""Redis Sentinel: URLs of a service that sentinels watch, and the search for its primary."""
