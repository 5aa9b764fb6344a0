"""The embedded server: a Valkey or Redis of our own, for one machine."""
