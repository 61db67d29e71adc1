"""A real libvirtd in the guest defines what `vm libvirt` prints, and starts it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.commands import driver_of, modprobe, vfiotool
from tests.lab.vfio_guest import EDU
from tests.oracles import libvirtd

MACHINE = "full"
KERNELS = ("6.12",)
PROOF = "long: libvirtd starts a QEMU within an emulated guest"
LIMIT_S = 3600.0

NVME = "0000:03:00.0"
MDEV = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
# No virtlogd runs here, which is who keeps a QEMU's output otherwise.
CONFIGURATION = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = []
stdio_handler = "file"
"""
DOMAIN = """\
<domain type='qemu'>
  <name>vm1</name>
  <memory unit='MiB'>128</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{devices}
  </devices>
</domain>
"""


def run(*words: str, code: int = 0) -> str:
    """A command's output, from this process: loading Python anew each time takes long here."""
    ran = vfiotool(*words)
    assert ran.code == code, ran.out + ran.err
    return ran.out


def virsh(*words: str) -> str:
    done = subprocess.run(
        ["virsh", "-c", "qemu:///system", *words],
        env=libvirtd.environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def daemon() -> Iterator[None]:
    """libvirtd with the QEMU of the guest; it names its own files below /usr/share."""
    if not libvirtd.is_here():
        pytest.skip("no libvirtd is unpacked on this machine: python -m tests.oracles.libvirtd")
    share = Path("/usr/share/libvirt")
    if not share.exists():
        share.symlink_to(libvirtd.folder() / "usr/share/libvirt")
    # Before it has read that QEMU runs as root, it looks for whom its package would have made.
    for table, line in (("passwd", "64055:64055::/:/bin/false"), ("group", "64055:")):
        with open(f"/etc/{table}", "a", encoding="utf-8") as file:
            file.write(f"libvirt-qemu:x:{line}\n")
    Path("/etc/libvirt").mkdir(exist_ok=True)
    Path("/etc/libvirt/qemu.conf").write_text(CONFIGURATION)
    log = open("/tmp/libvirtd.log", "wb")  # noqa: SIM115
    process = subprocess.Popen(["libvirtd"], env=libvirtd.environment(), stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while not Path("/run/libvirt/libvirt-sock").exists():
            assert process.poll() is None, Path("/tmp/libvirtd.log").read_text()
            assert time.monotonic() < end, "libvirtd made no socket"
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(120)
        log.close()


@pytest.mark.usefixtures("daemon")
def test_libvirtd_defines_what_vm_libvirt_prints_and_starts_it_twice() -> None:
    modprobe("vfio-pci", "vfio_iommu_type1", "mtty")
    run("bind", EDU, NVME)
    run("mdev", "create", "mtty", "mtty-2", "--uuid", MDEV)
    Path("/tmp/vm1.xml").write_text(DOMAIN.format(devices=run("vm", "libvirt", EDU, NVME, MDEV)))
    virsh("define", "/tmp/vm1.xml")
    kept = virsh("dumpxml", "vm1")
    assert kept.count("<hostdev ") == 3 and MDEV in kept
    for _ in range(2):
        virsh("start", "vm1")
        assert virsh("domstate", "vm1") == "running"
        qtree = virsh("qemu-monitor-command", "vm1", "--hmp", "info qtree")
        assert qtree.count("dev: vfio-pci,") == 3
        assert run("vm", "check", EDU, code=1)
        virsh("destroy", "vm1")
        assert driver_of(EDU) == driver_of(NVME) == "vfio-pci"
        run("vm", "check", EDU, NVME, MDEV)
    virsh("undefine", "vm1")
    run("release", EDU, NVME)
    run("mdev", "remove", MDEV)
    assert driver_of(NVME) == "nvme"
