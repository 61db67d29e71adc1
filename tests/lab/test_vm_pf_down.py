"""A VF whose PF is down: `vm check` warns, and the VF's driver, here as in a VM, has neither a link
nor the address that was set."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.commands import modprobe
from tests.lab.vfio_guest import PCI, unbind
from tests.lab.vm_starts import findings, run

MACHINE = "net"
KERNELS = ("6.12",)
PROOF = "waits for links that do not come up"

PF, VF = "0000:01:00.0", "0000:01:10.0"
MAC = "52:54:00:aa:bb:02"


def ip(*words: str) -> None:
    subprocess.run(["ip", "link", "set", *words], check=True)


def interface(address: str) -> Path:
    return next((PCI / address / "net").iterdir())


def as_a_vm_finds_it() -> tuple[str, str]:
    """The VF's address and carrier once its driver has it and it is up."""
    (PCI / VF / "driver_override").write_text("igbvf")
    (PCI.parent / "drivers_probe").write_text(VF)
    net = interface(VF)
    ip(net.name, "up")
    end = time.monotonic() + 30
    while (net / "carrier").read_text().strip() != "1" and time.monotonic() < end:
        time.sleep(0.5)
    found = (net / "address").read_text().strip(), (net / "carrier").read_text().strip()
    unbind(VF)
    return found


def test_a_vf_whose_pf_is_down_has_no_link_and_another_address() -> None:
    modprobe("igb", "igbvf", "vfio-pci")
    if not (PCI / PF / "sriov_numvfs").exists():
        pytest.skip("this QEMU has no igb")
    net = interface(PF).name
    ip(net, "down")
    run("vf", "set", PF, "1", "--no-autoprobe", code=0)
    ip(net, "vf", "0", "mac", MAC)
    found = findings(VF)["pf-down"]
    assert found["severity"] == "warning" and net in found["detail"]
    address, carrier = as_a_vm_finds_it()
    assert address != MAC and carrier == "0"
    subprocess.run(["sh", "-c", found["next"]], check=True)
    assert "pf-down" not in findings(VF)
    assert as_a_vm_finds_it() == (MAC, "1")
    run("vf", "set", PF, "0", code=0)
