"""The command ``penstock``: one module for each of its commands, loaded when it is asked for."""

from .exits import end_if_interrupted


def main() -> None:
    """Run the command, and end the process with its exit code."""
    end_if_interrupted()
    from .entry_point import run  # not before: loading it takes longer than anything else here

    run()
