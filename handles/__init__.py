"""Calling a backend from Python with nothing but a Redis URL: sync and asyncio handles, batch producers, errors."""
