"""A display in use, produced for real; `why` names it, and lets go when its driver has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.blockers_guest import PCI, blockers, need, wait_for, why
from tests.lab.commands import driver_of, override_of, vfiotool

MACHINE = "display"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

EDU = "0000:00:01.0"


def display() -> str:
    """The VGA function that the firmware booted on."""
    for folder in sorted(PCI.iterdir()):
        flag = folder / "boot_vga"
        if flag.exists() and flag.read_text().strip() == "1":
            return folder.name
    pytest.fail("this machine has no boot display")


def test_the_boot_display_is_named_until_vfio_has_it() -> None:
    need("vfio-pci")
    address = display()
    (entry,) = blockers(address, "boot-vga")
    assert entry["evidence"] == f"{PCI}/{address}/boot_vga is 1"
    assert why(address)[0] == 1
    override = PCI / address / "driver_override"
    override.write_text("vfio-pci")
    if (PCI / address / "driver").exists():
        (PCI / address / "driver" / "unbind").write_text(address)
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    try:
        assert (PCI / address / "driver").resolve().name == "vfio-pci"
        assert blockers(address, "boot-vga") == []
    finally:
        (PCI / address / "driver" / "unbind").write_text(address)
        override.write_text("\n")


@pytest.mark.parametrize("driver", [None, "bochs-drm"])
def test_bind_refuses_the_boot_display_unless_it_is_allowed(driver: str | None) -> None:
    """Without a driver (the text console is on it all the same) and with one."""
    need("vfio-pci", "bochs")
    address = display()
    folder = PCI / address
    if driver is None and driver_of(address) is not None:
        (folder / "driver" / "unbind").write_text(address)
    if driver is not None and driver_of(address) is None:
        Path("/sys/bus/pci/drivers_probe").write_text(address)
    if driver_of(address) != driver:
        pytest.skip(f"this kernel has no {driver}")
    before = driver_of(address), override_of(address)
    refused = vfiotool("bind", address, "--json")
    assert refused.code == 4, refused
    assert f"--allow boot-vga:{address}" in refused.json["error"]["hint"]
    assert (driver_of(address), override_of(address)) == before
    words = [word for word in refused.json["error"]["hint"].split() if ":" in word]
    allows = [part for word in words if not word.endswith(":") for part in ("--allow", word)]
    taken = vfiotool("bind", address, *allows)
    assert taken.code == 0, taken
    assert driver_of(address) == "vfio-pci"
    assert vfiotool("release", address).code == 0
    assert (driver_of(address), override_of(address)) == before
    if driver_of(address) is not None:
        (folder / "driver" / "unbind").write_text(address)


def test_a_lit_connector_and_the_frame_buffer_console_are_named() -> None:
    need("bochs")
    address = display()
    if not (PCI / address / "driver").exists():
        Path("/sys/bus/pci/drivers_probe").write_text(address)
    driver = PCI / address / "driver"
    if not driver.exists():
        pytest.skip("no driver of this kernel takes the display")

    def lit() -> list[Path]:
        found = Path("/sys/class/drm").glob("card*-*")
        return [path for path in found if (path / "enabled").read_text().strip() == "enabled"]

    consoles = [
        path
        for path in Path("/sys/class/vtconsole").iterdir()
        if "frame buffer" in (path / "name").read_text()
    ]
    if not consoles:
        pytest.skip("this kernel draws no console on frame buffers")
    wait_for(lit, "a lit connector")
    found = {entry["subject"]: entry for entry in blockers(address, "display")}
    connector = lit()[0]
    assert found[connector.name]["evidence"] == f"{connector}/enabled is enabled"
    assert "fb0" in found
    assert (consoles[0] / "bind").read_text().strip() == "1"
    assert found["fb0"]["evidence"] == f"/sys/class/graphics/fb0, {consoles[0]}/bind is 1"
    remedy = f"echo 0 > {consoles[0]}/bind"
    assert remedy in why(address)[1]["next"]
    (consoles[0] / "bind").write_text("0")
    assert "fb0" not in {entry["subject"] for entry in blockers(address, "display")}
    (driver / "unbind").write_text(address)
    assert blockers(address, "display") == []


def test_a_device_that_is_no_display_is_not_blamed() -> None:
    need("vfio-pci")
    assert why(EDU)[1]["blockers"] == []
