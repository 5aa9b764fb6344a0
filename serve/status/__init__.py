"""The status of an instance: read from the registry, printed, and with warnings."""
