"""Replies as callers hold them: futures, responses, streams, and Ray object references."""
