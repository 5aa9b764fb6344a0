"""Deploying from a file: the manifest and what changes it makes."""
