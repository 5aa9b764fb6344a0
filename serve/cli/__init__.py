"""The command ``penstock``: one module for each of its commands, imported when it is used."""

from .exits import end_if_extra_is_missing, end_if_interrupted


def main() -> None:
    """Run the command, and end the process with its exit code."""
    end_if_interrupted()
    try:
        from .entry_point import run  # After the signal handler, because this import takes the longest.
    except ModuleNotFoundError as e:
        end_if_extra_is_missing(e)
        raise
    run()
