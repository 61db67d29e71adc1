"""The command table and the one place where errors become text and exit codes.

Importing typer costs more than listing a host, and each area of commands more again: only the
module of the command that was typed is imported, and `--version` and plain `groups` need none.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

from vfiotool import __version__
from vfiotool.errors import InternalError, KernelError, VfiotoolError

COMMANDS: dict[str, str] = {
    "groups": "look.inspect",
    "devices": "look.inspect",
    "show": "look.inspect",
    "why": "look.inspect",
    "doctor": "look.doctor",
    "tree": "look.tree",
    "watch": "look.watch",
    "snapshot": "look.snapshot",
    "bind": "change.bind",
    "release": "change.bind",
    "vf": "change.bind",
    "mdev": "change.bind",
    "plan": "change.policy",
    "apply": "change.policy",
    "confirm": "change.policy",
    "status": "change.policy",
    "undo": "change.policy",
    "history": "change.policy",
    "recover": "change.policy",
    "export": "change.policy",
    "vdpa": "change.vdpa",
    "import": "change.boot",
    "boot": "change.boot",
    "vm": "vm",
    "device": "drive.device",
    "demo": "drive.device",
    "nvme": "drive.nvme",
    "lab": "lab",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (CONTRACT, exit codes)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["--version"]:
        sys.stdout.write(f"vfiotool {__version__}\n")
        return 0
    own = _own_arguments(arguments)
    try:
        code = _run_fast(arguments)
        if code is None:
            code = _run_command(arguments)
        sys.stdout.flush()
        return code
    except VfiotoolError as error:
        if "--debug" in own:
            _print_traceback()
        return report(error, as_json="--json" in own)
    except BrokenPipeError:
        _give_up_output()  # the reader (head, less) has gone
        return 0
    except KeyboardInterrupt as error:
        return _interrupted(getattr(error, "number", None))
    except Exception as error:
        if "--debug" in own:
            _print_traceback()
        if isinstance(error, OSError) and _is_of_output(error):
            _give_up_output()
            sys.stderr.write(f"vfiotool: the output cannot be written: {error.strerror}\n")
            return KernelError.exit_code
        return report(InternalError.of(error), as_json="--json" in own)


def _interrupted(number: int | None) -> int:
    """The shell's code for an end by a signal; one with a number was kept until a change was
    taken back (change/interrupt.py)."""
    if number is None:
        return 130
    sys.stderr.write("vfiotool: interrupted: what was begun has been taken back\n")
    return 128 + number


def _give_up_output() -> None:
    """Keep the interpreter's exit from complaining again about what cannot be written."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _is_of_output(error: OSError) -> bool:
    """Whether it comes of writing to standard output; what reads a host names its file."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def report(error: VfiotoolError, *, as_json: bool) -> int:
    """Print an error in the contract's shape or for people; returns its exit code."""
    from vfiotool.cli.output import escape

    if as_json:
        import json

        sys.stdout.write(json.dumps(error.as_json(), indent=2) + "\n")
    else:
        sys.stderr.write(f"vfiotool: {escape(error.message)}\n")
        if error.hint:
            sys.stderr.write(f"  {escape(error.hint)}\n")
    sys.stdout.flush()
    return error.exit_code


def _own_arguments(arguments: list[str]) -> list[str]:
    """The arguments that are vfiotool's, not those of the command that `lab run` starts."""
    for position, argument in enumerate(arguments):
        if argument == "--":
            return arguments[:position]
        if argument == "run" and position and arguments[position - 1] == "lab":
            end = position + 1
            while arguments[end : end + 1] in (["--json"], ["--debug"]):
                end += 1
            return arguments[:end]
    return arguments


def _command_name(arguments: list[str]) -> str | None:
    """The command typed, past the global options."""
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--root":
            skip = True
        elif not argument.startswith("-"):
            return argument
    return None


def _run_fast(arguments: list[str]) -> int | None:
    """`groups` and `devices` without typer, given nothing but names and global options."""
    command = _command_name(arguments)
    if command not in ("groups", "devices"):
        return None
    words: list[str] = []
    root: str | None = None
    pending = iter(arguments)
    for argument in pending:
        if argument == "--root":
            root = next(pending, None)
            if root is None:
                return None
        elif argument.startswith("--root="):
            root = argument.removeprefix("--root=")
        elif argument.startswith("-"):
            if argument not in ("--json", "--debug"):
                return None
        else:
            words.append(argument)
    names, as_json = words[1:], "--json" in arguments
    from vfiotool.cli.look.groups import open_lean, run_groups

    if command == "devices":
        from vfiotool.cli.look.devices import run_devices

        return run_devices(open_lean(root), names, as_json=as_json)
    if not all(name.isdecimal() for name in names):
        return None
    return run_groups(open_lean(root), [int(name) for name in names], as_json=as_json)


def _run_command(arguments: list[str]) -> int:
    from vfiotool.cli.frame import run

    name = _command_name(arguments)
    chosen = {COMMANDS[name]} if name in COMMANDS else set(COMMANDS.values())
    modules = [import_module(f"vfiotool.cli.{module}") for module in sorted(chosen)]
    return run(modules, _hoist_globals(arguments))


def _hoist_globals(arguments: list[str]) -> list[str]:
    """Move `--json` and `--debug` before the command's name, where the options are declared."""
    own = _own_arguments(arguments)
    flags = [flag for flag in ("--json", "--debug") if flag in own]
    rest = [argument for argument in own if argument not in flags]
    return [*flags, *rest, *arguments[len(own) :]]
