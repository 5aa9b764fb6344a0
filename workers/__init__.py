"""The claim, run, reply loop around user code, and the Ray actor around that."""
