"""`serve vfio-user`: this process is a PCI device in Python, of a VM or of a driver under test."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.models import Model

# How often is looked whether the server has ended by itself.
_LOOK_S = 1.0
# The models that come along, by the names of their drivers.
SHIPPED = {
    "edu": "vfiotool.models.edu:EduModel",
    "pci_testdev": "vfiotool.models.pci_testdev:PciTestdevModel",
    "nvme": "vfiotool.models.nvme:NvmeModel",
}

# As `FAULT_NAMES` of the models, which help does not import.
_FAULTS = (
    "slow",
    "mute",
    "gone",
    "reset-hangs",
    "reset-nothing",
    "reset-fails",
    "reset-lost",
    "d3-gone",
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:CLASS",
        help="A Model's class, FILE.py:CLASS, or one of edu, nvme, pci-testdev.",
        autocompletion=candidates.words(*(name.replace("_", "-") for name in SHIPPED)),
    ),
]
PathOption = Annotated[str, typer.Option("--socket-path", metavar="PATH", help="Listen there.")]
FaultOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="NAME",
        help=f"What it does wrong: {', '.join(_FAULTS)}.",
        autocompletion=candidates.words(*_FAULTS),
    ),
]


def vfio_user(model: ModelArgument, socket_path: PathOption, fault: FaultOption = None) -> int:
    """Serve a PCI device written in Python over vfio-user until SIGTERM.

    QEMU 10.1 and newer takes it as a vfio-user-pci device, drivers open it as vfio-user:PATH.
    """
    from vfiotool.cli.user_class import make
    from vfiotool.models import ModelServer

    made = make(load_model(model), model)
    for name in fault or ():
        made.faults.set(name)
    # Waited for, not handled: a handler that stops the server would wait for what it interrupts.
    signals = (signal.SIGTERM, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        try:
            serving = ModelServer(made, socket_path, report=output.log)
        except BaseException:
            made.close()
            raise
        with serving as server:
            while server.serving and signal.sigtimedwait(signals, _LOOK_S) is None:
                pass
            # A second one ends a model that does not let go.
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def load_model(text: str) -> type[Model]:
    """The class that `MODULE:CLASS`, `FILE.py:CLASS` or a shipped model's name stands for. Raises
    UsageError and NotFound as `load_class` does."""
    from vfiotool.cli.user_class import load_class
    from vfiotool.models import Model

    if ":" not in text and text.replace("-", "_") not in SHIPPED:
        shipped = ", ".join(name.replace("_", "-") for name in SHIPPED)
        raise UsageError(
            f"{text!r} is not MODULE:CLASS", hint=f"./mycard.py:Card, or one of: {shipped}"
        )
    return load_class(SHIPPED.get(text.replace("-", "_"), text), Model)
