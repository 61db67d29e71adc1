"""`python -m vfiotool`, and the `vfiotool` script."""

import gc
import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    # What is imported and read is many small objects that stay: to look for garbage among them
    # after every 700 took 7 % of a command's time, and a third of a long listing's.
    gc.set_threshold(50_000, 20, 20)
    from vfiotool.cli.main import main as run

    code = run()
    # What is left goes with the process; the interpreter would look through all of it for cycles.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
