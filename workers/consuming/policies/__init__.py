"""Policies of a consumer: decisions without I/O, which take the clock as an argument."""
