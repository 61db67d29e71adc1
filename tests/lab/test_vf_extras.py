"""What the real kernel says to VFs on vfio-pci, eswitch modes and counts of vectors.

No card of QEMU's has an eswitch or counts vectors: the kernel's refusals are what can be proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.kernel import end_state
from tests.lab.commands import PCI, driver_of, modprobe, vfiotool
from vfiotool.host.host import Host

MACHINE = "sriov"
KERNELS = ("6.1", "6.12", "iommufd")

ENABLE = Path("/sys/module/vfio_pci/parameters/enable_sriov")
TOKEN = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def pf_on(driver: str) -> str:
    for path in sorted(Path(PCI).iterdir()):
        if (path / "sriov_totalvfs").exists() and driver_of(path.name) == driver:
            return path.name
    pytest.skip(f"this machine has no function with VFs on {driver}")


@pytest.fixture
def disk() -> Iterator[str]:
    """The NVMe disk with VFs; whatever was done to it is taken back."""
    modprobe("vfio-pci")
    address, before = pf_on("nvme"), end_state(Host.local())
    yield address
    while vfiotool("undo", "--json").json["undone"] is not None:
        pass
    assert end_state(Host.local()) == before
    if ENABLE.exists():
        ENABLE.write_text("N")


def policy(tmp_path: Path, address: str, *more: str) -> str:
    path = tmp_path / "policy.toml"
    lines = ["version = 1", "[[sriov]]", f'match = {{ address = "{address}" }}', "vfs = 1", *more]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_vfio_pci_makes_the_vfs_of_a_function_that_a_policy_gives_it(
    disk: str, tmp_path: Path
) -> None:
    text = policy(tmp_path, disk, 'driver = "vfio-pci"', f'vf_token = "{TOKEN}"')
    if not ENABLE.exists():
        pytest.skip("vfio-pci of this kernel cannot make VFs")
    ENABLE.write_text("N")
    refused = vfiotool("apply", text)
    assert refused.code == 4
    assert "enable_sriov=1" in refused.err
    assert driver_of(disk) == "nvme"
    ENABLE.write_text("Y")
    applied = vfiotool("apply", text)
    assert applied.code == 0, applied.err
    assert f"note: {disk} is on vfio-pci: its VFs open only with the VF token" in applied.err
    vf = (Path(PCI) / disk / "virtfn0").resolve().name
    # vfio-pci takes the VFs of its functions by itself.
    assert (driver_of(disk), driver_of(vf)) == ("vfio-pci", "vfio-pci")
    assert vfiotool("status", text).code == 0
    # The policy that was applied knows the token.
    assert vfiotool("vm", "check", vf).code == 0
    assert f"vf-token={TOKEN}" in vfiotool("vm", "qemu", vf).out
    exported = tmp_path / "exported.toml"
    exported.write_text(vfiotool("export").out)
    assert vfiotool("status", str(exported)).code == 0


def test_vectors_that_the_driver_cannot_count_are_an_error_and_all_goes_back(
    disk: str, tmp_path: Path
) -> None:
    before = end_state(Host.local())
    failed = vfiotool("apply", policy(tmp_path, disk, "vf = [ { index = 0, msix = 3 } ]"))
    assert failed.code == 5
    assert "sriov_vf_msix_count" in failed.err
    assert end_state(Host.local()) == before


@pytest.mark.parametrize("driver", ["igb", "nvme"])
def test_a_function_without_eswitch_says_so(driver: str) -> None:
    address = pf_on(driver)
    refused = vfiotool("vf", "set", address, "1", "--eswitch", "switchdev")
    assert refused.code == 8
    assert f"{address} has no eswitch: its driver, {driver}, knows no modes" in refused.err
