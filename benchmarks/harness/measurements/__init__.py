"""Measurements: for each kind of case its programs, its samples and its table."""
