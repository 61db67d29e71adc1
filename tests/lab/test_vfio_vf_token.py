"""A VF whose PF is driven from user space opens with the PF's token, and not without."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.commands import vfiotool
from tests.lab.vfio_guest import PCI, bind_vfio
from vfiotool.errors import NotPermitted
from vfiotool.vfio import Device

MACHINE = "sriov"
KERNELS = ("6.12", "iommufd")

ENABLE = Path("/sys/module/vfio_pci/parameters/enable_sriov")


def nvme_pf() -> str:
    for path in sorted(PCI.iterdir()):
        if (path / "class").read_text().startswith("0x0108") and (path / "sriov_totalvfs").exists():
            return path.name
    pytest.skip("this machine has no NVMe with VFs")


@pytest.fixture
def pf() -> Iterator[Device]:
    subprocess.run(["modprobe", "vfio-pci"], check=False)
    if not ENABLE.exists():
        pytest.skip("vfio-pci of this kernel cannot enable VFs")
    ENABLE.write_text("Y")
    address = nvme_pf()
    bind_vfio(address)
    with Device.open(address, backend="type1") as device:
        yield device
    (PCI / address / "sriov_numvfs").write_text("0")


def test_the_token_that_the_pf_set_opens_its_vfs(pf: Device) -> None:
    token = uuid.uuid4()
    pf.set_vf_token(token)
    (PCI / pf.name / "sriov_drivers_autoprobe").write_text("0")
    (PCI / pf.name / "sriov_numvfs").write_text("1")
    vf = (PCI / pf.name / "virtfn0").resolve().name
    bind_vfio(vf)
    with pytest.raises(NotPermitted) as caught:
        Device.open(vf, backend="type1")
    assert "token" in (caught.value.hint or "")
    with pytest.raises(NotPermitted):
        Device.open(vf, backend="type1", vf_token=str(uuid.uuid4()))
    vendor = (PCI / pf.name / "vendor").read_text().strip()
    refused = vfiotool("device", "read", vf, "config", "0", "--width", "2", "--backend", "type1")
    assert refused.code == 7
    assert "--vf-token" in refused.err
    asked = ("device", "read", vf, "config", "0", "--width", "2", "--vf-token", str(token))
    assert vfiotool(*asked, "--json").json["values"] == [int(vendor, 16)]
    with Device.open(vf, backend="type1", vf_token=str(token)) as device:
        assert device.info.is_pci
        assert device.config.read16(0) == int(vendor, 16)
