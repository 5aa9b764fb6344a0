"""User code: how it is loaded, called, and turned into replies."""
