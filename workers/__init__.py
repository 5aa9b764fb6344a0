"""Replicas, which claim requests, run user code and reply."""
