"""`python -m vfiotool`, and the `vfiotool` script."""

import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from vfiotool.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
