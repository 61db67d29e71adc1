"""What `vm qemu` prints is what a QEMU in the guest takes, and it opens the devices."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lab.vfio_guest import EDU, TESTDEV, unbind

MACHINE = "basic"
KERNELS = ("6.12", "iommufd")
PROOF = "long"

DEVICES = (EDU, TESTDEV)


def vfiotool(*words: str, code: int = 0) -> str:
    line = [sys.executable, "-m", "vfiotool", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def bound() -> Iterator[None]:
    vfiotool("bind", *DEVICES)
    yield
    vfiotool("release", *DEVICES)


def open_in_qemu(ask: str, *options: str) -> str:
    """Start QEMU with the options of `vm qemu`, stopped, and return what its monitor answers."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 in the guest's PATH")
    words = json.loads(vfiotool("--json", "vm", "qemu", *options, *DEVICES))["arguments"]
    line = [qemu, "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-S"]
    done = subprocess.run(
        [*line, "-monitor", "stdio", *words],
        input=f"{ask}\nquit\n",
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_device_on_no_vfio_driver_is_not_ready() -> None:
    unbind(DEVICES[0])
    assert "not-bound" in vfiotool("vm", "check", DEVICES[0], code=1)
    vfiotool("vm", "qemu", DEVICES[0], code=4)


@pytest.mark.usefixtures("bound")
def test_qemu_opens_what_vm_qemu_prints() -> None:
    assert "not ready" not in vfiotool("vm", "check", *DEVICES)
    answer = open_in_qemu("info qtree")
    assert 'dev: vfio-pci, id "vfio-0000-00-01.0"' in answer
    assert 'dev: vfio-pci, id "vfio-0000-00-02.0"' in answer


@pytest.mark.usefixtures("bound")
def test_qemu_opens_them_over_iommufd_where_the_kernel_has_it() -> None:
    from vfiotool.host.host import Host
    from vfiotool.host.paths import DEV_IOMMU

    if not Host.local().exists(DEV_IOMMU):
        pytest.skip("this kernel has no iommufd")
    ask = "qom-get /machine/peripheral/vfio-0000-00-01.0 iommufd"
    assert '"/objects/iommufd0"' in open_in_qemu(ask, "--iommufd")
