"""The shared cases on a guest's kernel and on a fake one that mirrors it: the same results, the
same end states. What the fake kernel teaches the other tests is true."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.change.cases import CASES, run
from tests.change.changing import EDU, NVME, run_folder
from tests.fakes.kernel import FakeKernel, end_state
from tests.fakes.mirror import mirror
from tests.lab.commands import restore
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"


def needs(name: str) -> str | None:
    """What of the machine a case needs and this guest lacks."""
    host = Host.local()
    if "mdev" in name and not host.exists("/sys/class/mdev_bus/mtty"):
        return "this guest has no sample mdev parents"
    if "VF" in name and not host.exists("/sys/bus/pci/devices/0000:02:00.0/sriov_totalvfs"):
        return "this QEMU has no igb"
    return None


@pytest.fixture(scope="module")
def hesitant_nvme(drivers: None) -> bool:
    """Whether nvme's probe of what is no NVMe controller succeeds: 6.1 leaves it to a work item,
    which takes the driver off again later."""
    host = Host.local()
    base = f"/sys/bus/pci/devices/{EDU}"
    host.write_attribute(f"{base}/driver_override", "nvme")
    host.write_attribute("/sys/bus/pci/drivers_probe", EDU)
    taken = host.linkname(f"{base}/driver") == "nvme"
    while host.linkname(f"{base}/driver") is not None:
        time.sleep(0.1)
    host.write_attribute(f"{base}/driver_override", "\n")
    return taken


@pytest.fixture(scope="module", autouse=True)
def drivers() -> None:
    for module in ("vfio-pci", "igbvf"):
        subprocess.run(["modprobe", module], check=False, capture_output=True)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host.local()
    before = end_state(host)
    yield host
    restore(host)
    assert end_state(host) == before


@pytest.mark.parametrize("name", CASES)
def test_the_fake_kernel_does_as_this_kernel_does(
    name: str, host: Host, hesitant_nvme: bool
) -> None:
    missing = needs(name)
    if missing:
        pytest.skip(missing)
    twin: FakeKernel = mirror(host, hesitant_nvme=hesitant_nvme)
    assert end_state(twin.host()) == end_state(host)
    with run_folder() as real_folder, run_folder() as fake_folder:
        real = run(host, Journal(host, real_folder), CASES[name])
        fake = run(twin.host(), Journal(twin.host(), fake_folder), CASES[name])
        assert fake == real
        assert end_state(twin.host()) == end_state(host)
        assert recover(host, Journal(host, real_folder)) == ()


def test_the_names_of_this_machine_are_those_of_the_cases() -> None:
    assert {EDU, NVME} <= set(list_addresses(Host.local()))
