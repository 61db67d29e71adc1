"""`serve vfio-user`: this process is a PCI device in Python, of a VM or of a driver under test."""

from __future__ import annotations

import importlib
import importlib.util
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.errors import NotFound, UsageError

if TYPE_CHECKING:
    from vfiotool.models import Model

# The models that come along, by the names of their drivers.
SHIPPED = {
    "edu": "vfiotool.models.edu:EduModel",
    "pci_testdev": "vfiotool.models.pci_testdev:PciTestdevModel",
    "nvme": "vfiotool.models.nvme:NvmeModel",
}

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:CLASS",
        help="A model: FILE.py:CLASS, a module's, or one of edu, nvme, pci_testdev.",
        autocompletion=candidates.words(*SHIPPED),
    ),
]
PathOption = Annotated[str, typer.Option("--socket-path", metavar="PATH", help="Listen there.")]
FaultOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="NAME",
        help="slow, mute, gone, reset-hangs, reset-nothing, reset-fails, d3-gone.",
        autocompletion=candidates.words(
            "slow", "mute", "gone", "reset-hangs", "reset-nothing", "reset-fails", "d3-gone"
        ),
    ),
]


def vfio_user(model: ModelArgument, socket_path: PathOption, fault: FaultOption = None) -> int:
    """Serve a PCI device written in Python over vfio-user until SIGTERM.

    QEMU 10.1 and newer takes it as a vfio-user-pci device, drivers open it as vfio-user:PATH.
    """
    from vfiotool.models import ModelServer

    made = load_model(model)()
    for name in fault or ():
        made.faults.set(name)
    server = ModelServer(made, socket_path, report=output.warn)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    try:
        server.run()
    finally:
        server.stop()
        made.close()
    return 0


def load_model(text: str) -> type[Model]:
    """The class that `MODULE:CLASS` names. Raises UsageError for what is no model, NotFound."""
    from vfiotool.models import Model

    module, colon, name = SHIPPED.get(text.replace("-", "_"), text).rpartition(":")
    if not colon or not module or not name:
        raise UsageError(
            f"{text[:80]!r} is not a model",
            hint=f"MODULE:CLASS, FILE.py:CLASS, or one of {', '.join(SHIPPED)}",
        )
    found = getattr(_module(module), name, None)
    if found is None:
        raise NotFound(f"{module} has no class {name[:80]}")
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise UsageError(f"{text} is not a subclass of vfiotool.models.Model")
    return found


def _module(name: str) -> object:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None or not Path(name).is_file():
            raise NotFound(f"there is no file {name}")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made
    except (ImportError, SyntaxError, ValueError, TypeError) as error:
        raise UsageError(f"{name[:80]} cannot be imported: {error}") from error
