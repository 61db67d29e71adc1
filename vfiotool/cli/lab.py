"""`vfiotool lab …`: guests with a virtual IOMMU on real kernels."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, lab_rehearse, lab_twin, output
from vfiotool.cli.context import area, examples, wants_json
from vfiotool.errors import UsageError
from vfiotool.lab import machines
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.kernels.cache import be_silent

if TYPE_CHECKING:
    from vfiotool.lab.guest import Guest

MachineOption = Annotated[
    str,
    typer.Option(
        "--machine",
        metavar="NAME",
        help="What the guest is made of; `lab machines` lists them.",
        autocompletion=candidates.machines,
    ),
]
KernelOption = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="A name that `lab kernels` lists, or a bzImage.",
        autocompletion=candidates.kernels,
    ),
]
ShareOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--share",
        metavar="DIR",
        help="A folder that the guest may write to.",
        autocompletion=candidates.files,
    ),
]
MemoryOption = Annotated[
    int | None, typer.Option("--memory", metavar="MIB", min=256, help="The guest's memory.")
]
CpusOption = Annotated[
    int, typer.Option("--cpus", metavar="N", min=1, max=16, help="The guest's processors.")
]
AppendOption = Annotated[
    list[str] | None,
    typer.Option("--append", metavar="WORD", help="One more word for the guest's kernel."),
]


app = area("Rehearse in QEMU guests with a virtual IOMMU, on real kernels.")
app.command(
    "twin",
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "vfiotool lab twin --plan host.vfiosnap",
        "vfiotool lab twin host.vfiosnap",
        "vfiotool lab twin host.vfiosnap -- vfiotool why 0000:01:00.0",
    ),
)(lab_twin.twin)
app.command(
    "rehearse",
    epilog=examples(
        "vfiotool lab rehearse policy.toml",
        "vfiotool lab rehearse policy.toml --host host.vfiosnap",
        "vfiotool lab rehearse policy.toml --host host.vfiosnap --fault 01:00.0=reset-nothing",
    ),
)(lab_rehearse.rehearse)


@app.command(
    "run",
    # What follows the command's name is the command's, options included.
    context_settings={"allow_interspersed_args": False},
    epilog=examples(
        "vfiotool lab run -- lspci -nnk",
        "vfiotool lab run --machine full --kernel 6.1 -- vfiotool groups --json",
        "vfiotool lab run --share out -- bash script.sh",
    ),
)
def run_command(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="A command and its own options.")
    ],
    machine: MachineOption = machines.DEFAULT,
    kernel: KernelOption = kernels.DEFAULT,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="End the command after this time.")
    ] = 600.0,
    share: ShareOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = 1,
    append: AppendOption = None,
) -> int:
    """Run COMMAND in a guest, in this folder, and exit with its exit code.

    The guest sees this machine's files, and its changes to them are gone with it. Exit code 124
    says that the command ran out of time, 125 that the guest was lost, 127 that there is no such
    command.
    """
    from vfiotool.lab.channel import Kind

    end_on_sigterm()

    def forward(kind: Kind, data: bytes) -> None:
        output.forward(data, error=kind is not Kind.OUTPUT)

    guest = _guest(machine, kernel, share, memory, cpus, append)
    _say_what_boots(guest.describe(), machine, guest.missing_models())
    with guest:
        return guest.exec(command, timeout_s=timeout, sink=forward).exit_code


@app.command("shell", epilog=examples("vfiotool lab shell", "vfiotool lab shell --machine storage"))
def shell_command(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND…", help="Instead of bash.")
    ] = None,
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
    end_on_sigterm()
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


@app.command("machines", epilog=examples("vfiotool lab machines"))
def machines_command(context: typer.Context) -> int:
    """List the machines that a guest can be."""
    rows = list(machines.MACHINES.values())
    if wants_json(context):
        output.emit({"machines": [machines.as_json(row) for row in rows]})
        return 0
    output.table(("MACHINE", "WHAT IT IS"), [[(row.name, "bold"), row.summary] for row in rows])
    return 0


@app.command("kernels", epilog=examples("vfiotool lab kernels", "vfiotool lab kernels --get 6.12"))
def kernels_command(
    context: typer.Context,
    get: Annotated[
        list[str] | None, typer.Option("--get", metavar="NAME", help="Fetch or build this one.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="With --get: anew, from the newest packages.")
    ] = False,
) -> int:
    """List the kernels that a guest can boot: what is here, what is missing, how to get it."""
    for name in get or []:
        kernels.prepare(name, update=update)
    rows = kernels.statuses()
    if wants_json(context):
        output.emit({"kernels": [kernels.as_json(row) for row in rows]})
        return 0
    for row in rows:
        mark = ("ready  ", "green") if row.ready else ("missing", "yellow")
        output.write((f"{row.name:8}", "bold"), " ", mark, f" {row.release or '':26} {row.summary}")
        for note in (*row.notes, *([f"get it: {row.get}"] if row.get else [])):
            output.write(f"{'':17}{note}")
    return 0


@app.command("demo", epilog=examples("vfiotool lab demo"))
def demo_command(
    kernel: KernelOption = kernels.DEFAULT,
) -> int:
    """Show a device's passthrough from end to end in a guest: refuse, bind, drive, release."""
    from vfiotool.lab import demo

    end_on_sigterm()
    return demo.main(kernel)


def _folders(share: list[Path] | None) -> tuple[Path, ...]:
    for folder in share or []:
        if not folder.is_dir():
            raise UsageError(f"--share {folder}: no such folder", hint=f"mkdir -p {folder}")
    return tuple(share or ())


def _say_what_boots(description: str, machine: str, missing: tuple[str, ...]) -> None:
    if output.quiet():
        be_silent()
    output.say(f"lab: {description}")
    if missing:
        output.say(f"lab: machine {machine} comes without {', '.join(missing)}: this QEMU has none")


def end_on_sigterm() -> None:
    """Have SIGTERM unwind like Ctrl-C, so that the guest ends and its scratch files go."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
