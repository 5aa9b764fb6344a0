"""Reconciliation: the controller compares desired with observed state and acts on the difference."""
