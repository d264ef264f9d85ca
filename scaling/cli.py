"""The command line (in the making)."""


def main() -> None:
    """Entry point of the console script."""
