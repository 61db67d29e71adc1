"""Running vfiotool's commands inside a guest's test process: one interpreter start for all."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from dataclasses import dataclass
from typing import Any

from vfiotool.cli.app import main
from vfiotool.host import Host

PCI = "/sys/bus/pci/devices"


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def vfiotool(*arguments: str) -> Ran:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return Ran(code, out.getvalue(), err.getvalue())


def driver_of(address: str) -> str | None:
    return Host.local().linkname(f"{PCI}/{address}/driver")


def override_of(address: str) -> str | None:
    found = Host.local().read(f"{PCI}/{address}/driver_override")
    return None if found == "(null)" else found


def modprobe(*names: str) -> None:
    """Load modules; those that are built in or absent are no error here."""
    for name in names:
        subprocess.run(["modprobe", name], check=False, capture_output=True)
