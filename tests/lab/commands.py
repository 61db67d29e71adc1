"""Running vfiotool's commands inside a guest's test process: one interpreter start for all."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from dataclasses import dataclass
from typing import Any

from vfiotool.cli.main import main
from vfiotool.devices.mdev import read_mdevs
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host

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


def restore(host: Host) -> None:
    """Bring the guest back by bare writes, so that one test does not depend on another."""
    for mdev in read_mdevs(host):
        host.write_attribute(f"/sys/bus/mdev/devices/{mdev.uuid}/remove", "1")
    for address in ("0000:01:00.0", "0000:02:00.0"):
        base = f"/sys/bus/pci/devices/{address}"
        if host.read(f"{base}/sriov_numvfs") not in (None, "0"):
            host.write_attribute(f"{base}/sriov_numvfs", "0")
        if host.read(f"{base}/sriov_drivers_autoprobe") == "0":
            host.write_attribute(f"{base}/sriov_drivers_autoprobe", "1")
    for address in list_addresses(host):
        base = f"/sys/bus/pci/devices/{address}"
        if host.read(f"{base}/driver_override") != "(null)":
            host.write_attribute(f"{base}/driver_override", "\n")
        if host.linkname(f"{base}/driver") == "vfio-pci":
            host.write_attribute("/sys/bus/pci/drivers/vfio-pci/unbind", address)
        if host.linkname(f"{base}/driver") is None:
            host.write_attribute("/sys/bus/pci/drivers_probe", address)
