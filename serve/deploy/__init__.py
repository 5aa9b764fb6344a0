"""Deploying from a file: the manifest, and the changes that it makes."""
