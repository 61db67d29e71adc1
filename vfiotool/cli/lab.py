"""`vfiotool lab …`: guests with a virtual IOMMU on real kernels."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.output import emit, say, state, write
from vfiotool.errors import UsageError
from vfiotool.lab import machines
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.kernels.cache import be_silent

if TYPE_CHECKING:
    from vfiotool.lab.guest import Guest

MachineOption = Annotated[
    str, Option("--machine", metavar="NAME", help="What the guest is made of: lab machines.")
]
KernelOption = Annotated[
    str, Option("--kernel", metavar="NAME", help="A name of `lab kernels`, or a bzImage.")
]
ShareOption = Annotated[
    list[Path] | None,
    Option("--share", metavar="DIR", help="A folder that the guest may write to."),
]
MemoryOption = Annotated[int | None, Option("--memory", metavar="MIB", min=256)]
CpusOption = Annotated[int, Option("--cpus", metavar="N", min=1, max=16)]
AppendOption = Annotated[
    list[str] | None,
    Option("--append", metavar="WORD", help="One more word for the guest's kernel."),
]


def register(app: Commands) -> None:
    """Add the lab's commands to `app`."""
    lab = Commands(
        help="Rehearse in QEMU guests with a virtual IOMMU, on real kernels.",
    )
    lab.command(
        "run",
        short_help="Run one command in a guest.",
        context_settings={"allow_interspersed_args": False},
    )(run_command)
    lab.command("shell")(shell_command)
    lab.command("machines")(machines_command)
    lab.command("kernels", short_help="List the kernels that a guest can boot.")(kernels_command)
    lab.command("demo", short_help="Show the whole way of a device in a guest.")(demo_command)
    app.add_typer(lab, name="lab")


def run_command(
    command: Annotated[list[str], Argument(metavar="COMMAND…")],
    machine: MachineOption = machines.DEFAULT,
    kernel: KernelOption = kernels.DEFAULT,
    timeout: Annotated[float, Option(metavar="SECONDS", min=0.1)] = 600.0,
    share: ShareOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = 1,
    append: AppendOption = None,
    quiet: Annotated[bool, Option(help="Do not say what is booted.")] = False,
) -> int:
    """Run COMMAND in a guest, in this folder, and exit with its exit code.

    The guest sees this machine's files, and its changes to them are gone with it. Exit code 124
    says that the command ran out of time, 125 that the guest was lost, 127 that there is no such
    command.
    """
    from vfiotool.lab.channel import Kind

    _end_on_sigterm()

    def forward(kind: Kind, data: bytes) -> None:
        stream = sys.stdout if kind is Kind.OUTPUT else sys.stderr
        stream.buffer.write(data)
        stream.buffer.flush()

    if quiet:
        be_silent()
    guest = _guest(machine, kernel, share, memory, cpus, append)
    if not quiet:
        _say_what_boots(guest.describe(), machine, guest.missing_models())
    with guest:
        return guest.exec(command, timeout_s=timeout, sink=forward).exit_code


def shell_command(
    command: Annotated[list[str] | None, Argument(metavar="COMMAND…")] = None,
    machine: MachineOption = machines.DEFAULT,
    kernel: KernelOption = kernels.DEFAULT,
    share: ShareOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = 1,
    append: AppendOption = None,
) -> int:
    """A shell in a guest on this terminal; the guest ends with it."""
    from vfiotool.lab.terminal import attach

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "lab shell needs a terminal", hint="without one: vfiotool lab run -- COMMAND…"
        )
    _end_on_sigterm()
    guest = _guest(machine, kernel, share, memory, cpus, append)
    _say_what_boots(guest.describe(), machine, guest.missing_models())
    with guest:
        return attach(guest, command or ["bash", "--norc", "-i"])


def _guest(
    machine: str,
    kernel: str,
    share: list[Path] | None,
    memory: int | None,
    cpus: int,
    append: list[str] | None,
) -> Guest:
    """The guest that the options of `run` and `shell` describe, not yet started."""
    from vfiotool.lab.guest import Guest

    return Guest(
        machine,
        kernel,
        share=_folders(share),
        memory_mib=memory,
        vcpus=cpus,
        kernel_arguments=tuple(append or ()),
    )


def machines_command(context: Context) -> int:
    """List the machines that a guest can be."""
    rows = list(machines.MACHINES.values())
    if state(context).json:
        emit({"machines": [machines.as_json(row) for row in rows]})
        return 0
    for row in rows:
        write((f"{row.name:14}", "bold"), f" {row.summary}")
    return 0


def kernels_command(
    context: Context,
    get: Annotated[
        list[str] | None, Option("--get", metavar="NAME", help="Fetch or build this one.")
    ] = None,
    update: Annotated[
        bool, Option("--update", help="With --get: anew, from the newest packages.")
    ] = False,
) -> int:
    """List the kernels that a guest can boot: what is here, what is missing, how to get it."""
    for name in get or []:
        kernels.prepare(name, update=update)
    rows = kernels.statuses()
    if state(context).json:
        emit({"kernels": [kernels.as_json(row) for row in rows]})
        return 0
    for row in rows:
        mark = ("ready  ", "green") if row.ready else ("missing", "yellow")
        write((f"{row.name:8}", "bold"), " ", mark, f" {row.release or '':26} {row.summary}")
        for note in (*row.notes, *([f"get it: {row.get}"] if row.get else [])):
            write(f"{'':17}{note}")
    return 0


def demo_command(
    kernel: KernelOption = kernels.DEFAULT,
) -> int:
    """Show the whole way of a device in a guest: look, refuse, bind, drive, give back."""
    from vfiotool.lab import demo

    _end_on_sigterm()
    return demo.main(kernel)


def _folders(share: list[Path] | None) -> tuple[Path, ...]:
    for folder in share or []:
        if not folder.is_dir():
            raise UsageError(f"--share {folder}: no such folder", hint=f"mkdir -p {folder}")
    return tuple(share or ())


def _say_what_boots(description: str, machine: str, missing: tuple[str, ...]) -> None:
    say(f"lab: {description}")
    if missing:
        say(f"lab: machine {machine} comes without {', '.join(missing)}: this QEMU has none")


def _end_on_sigterm() -> None:
    """Have SIGTERM unwind like Ctrl-C, so that the guest ends and its scratch files go."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
