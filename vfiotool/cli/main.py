"""Where the command line begins, and the one place where errors become text and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys

from vfiotool import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.cli.globals import Globals

_VERSION = (["--version"], ["-V"], ["version"])


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (CONTRACT, exit codes)."""
    _open_standard_files()
    _take_back_children()
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in _VERSION:
        return _print_version()
    from vfiotool.cli import globals, output, paging, program

    if arguments[:1] == ["_complete"]:
        from vfiotool.cli import completing

        return completing.main(arguments[1:])
    chosen = globals.Globals()
    output.begin()
    try:
        try:
            code = program.run(arguments, chosen)
        finally:
            paging.end()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _give_up_output()  # the reader (head, less) has gone
        return chosen.code
    except KeyboardInterrupt as error:
        return _interrupted(getattr(error, "number", None))
    except Exception as error:
        return _report(error, chosen)


def _print_version() -> int:
    """Without what the other commands import."""
    try:
        sys.stdout.write(f"vfiotool {__version__}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_output()
    except OSError as error:
        from vfiotool.cli.globals import Globals

        return _report(error, Globals())
    return 0


def _open_standard_files() -> None:
    """What the caller closed leads nowhere from here on, rather than into the next file opened.
    Standard output then refuses what is written to it: an answer that nobody gets is an error."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: those below it are open by now.
            os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _take_back_children() -> None:
    """Where the caller ignores the end of children, so would this process: a program that failed,
    such as the one that arms a revert, would be taken for one that went well (waitpid(2))."""
    import signal

    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _report(error: Exception, chosen: Globals) -> int:
    """Print an error in the contract's shape or for people; returns its exit code."""
    from vfiotool.cli import output
    from vfiotool.errors import InternalError, KernelError, VfiotoolError

    if chosen.debug:
        output.traceback()
    if isinstance(error, OSError) and _is_of_output(error):
        _give_up_output()
        lost = f"the output cannot be written: {error.strerror}"
        if chosen.stands is not None:
            output.error(f"{lost}; {chosen.stands}", None)
            return chosen.code
        output.error(lost, None)
        return KernelError.exit_code
    told = error if isinstance(error, VfiotoolError) else InternalError.of(error)
    try:
        output.report(told, as_json=chosen.json)
        sys.stdout.flush()
    except OSError as lost_too:
        # What failed is what counts, and the exit code says it.
        _give_up_output()
        if chosen.json and not isinstance(lost_too, BrokenPipeError):
            output.error(told.message, told.hint)
    return told.exit_code


def _interrupted(number: int | None) -> int:
    """The shell's code for an end by a signal; one with a number was kept until a change was
    rolled back (change/signals.py)."""
    from vfiotool.cli import output

    if number is None:
        return 130
    output.error("interrupted: changes were rolled back", None)
    return 128 + number


def _give_up_output() -> None:
    """Keep the interpreter's exit from complaining again about what cannot be written.

    Without a descriptor: there may be none left.
    """
    sys.stdout = io.StringIO()


def _is_of_output(error: OSError) -> bool:
    """Whether it comes of writing to standard output; what reads a host names its file, and what
    the kernel answered to a change is an error of vfiotool's own."""
    from vfiotool.errors import VfiotoolError

    if isinstance(error, VfiotoolError) or error.filename is not None:
        return False
    if error.errno == errno.EBADF:
        return not _is_writable(1)
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _is_writable(descriptor: int) -> bool:
    import fcntl

    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False
