"""The doctor on real kernels: each finding against what the guest was started with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.blockers_guest import need
from vfiotool.cli.main import main

MACHINE = ("basic", "no-iommu", "virtio-iommu")
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"


def doctor() -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings by check."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(["--json", "doctor"])
    answer = json.loads(output.getvalue())
    assert answer["ready"] == (code == 0)
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in answer["findings"]:
        found.setdefault(entry["check"], []).append(entry)
    return code, found


def severity(check: str) -> str:
    return str(doctor()[1][check][0]["severity"])


def test_the_iommu_is_found_exactly_where_there_is_one(lab_machine: str) -> None:
    need("vfio-pci")
    code, found = doctor()
    there = lab_machine != "no-iommu"
    # Debian's 6.1 has no driver for a virtio IOMMU, neither built in nor as a module.
    driver = Path("/sys/bus/virtio/drivers/virtio_iommu")
    works = driver.is_dir() if lab_machine == "virtio-iommu" else there
    assert any(Path("/sys/class/iommu").iterdir()) == works
    assert found["iommu-effect"][0]["severity"] == ("ok" if works else "blocker")
    assert found["iommu-firmware"][0]["severity"] == ("ok" if there else "blocker")
    assert code == (0 if works else 1)


def test_interrupt_remapping_is_told_as_the_kernel_shows_it(lab_machine: str) -> None:
    remapped = " IR-" in Path("/proc/interrupts").read_text()
    expected = {"basic": "ok"}.get(lab_machine, "note")
    assert (severity("interrupt-remapping") == "ok") == remapped
    assert severity("interrupt-remapping") == expected


def test_a_module_is_told_loaded_built_in_or_not_loaded(lab_kernel: str) -> None:
    need("vfio-pci")
    summary = doctor()[1]["module-vfio-pci"][0]["summary"]
    if lab_kernel == "iommufd":
        assert summary.startswith("vfio-pci is built in")
        return
    assert summary == "vfio-pci is loaded"
    subprocess.run(["modprobe", "-r", "vfio-pci"], check=True)
    entry = doctor()[1]["module-vfio-pci"][0]
    assert (entry["severity"], entry["remedy"][0]) == ("note", "modprobe vfio-pci")
    assert Path(entry["evidence"]).exists()
    subprocess.run(["modprobe", "vfio-pci"], check=True)


def test_iommufd_is_told_where_the_kernel_has_it(lab_kernel: str) -> None:
    need("vfio-pci")
    assert severity("backends") == ("ok" if lab_kernel == "iommufd" else "note")
    assert Path("/dev/iommu").exists() == (lab_kernel == "iommufd")


def test_an_unsafe_option_warns_while_it_is_set(lab_machine: str) -> None:
    need("vfio-pci")
    path = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
    if not path.exists():
        pytest.skip("this kernel has no vfio_iommu_type1 parameters")
    assert severity("unsafe-option") == "ok"
    path.write_text("Y")
    try:
        entry = doctor()[1]["unsafe-option"][0]
        assert (entry["severity"], entry["evidence"]) == ("warning", f"{path} is Y")
    finally:
        path.write_text("N")


def test_huge_pages_are_counted() -> None:
    sizes = Path("/sys/devices/system/node/node0/hugepages")
    if not sizes.is_dir():
        pytest.skip("this kernel has no huge pages by node")
    assert severity("hugepages") == "note"
    count = sizes / "hugepages-2048kB" / "nr_hugepages"
    count.write_text("4")
    try:
        summary = doctor()[1]["hugepages"][0]["summary"]
        assert f"{count.read_text().strip()} of 2 MiB" in summary
    finally:
        count.write_text("0")


def test_without_privileges_the_lock_limit_is_told() -> None:
    limited = ("prlimit", "--memlock=65536:65536")
    nobody = ("setpriv", "--bounding-set=-all", "--reuid=65534", "--clear-groups")
    done = subprocess.run(
        [*limited, *nobody, sys.executable, "-m", "vfiotool", "--json", "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        pytest.skip(f"no unprivileged process here: {done.stderr.strip()[-200:]}")
    entries = json.loads(done.stdout)["findings"]
    (entry,) = [entry for entry in entries if entry["check"] == "memory-lock"]
    assert (entry["severity"], "64 KiB" in entry["summary"]) == ("warning", True)


def test_a_driverctl_override_and_a_policy_in_conflict_are_found() -> None:
    address = "0000:00:01.0"
    file = Path(f"/etc/driverctl.d/pci-{address}")
    domain = Path("/etc/libvirt/qemu/guest.xml")
    for path, text in (
        (file, "vfio-pci\n"),
        (
            domain,
            "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' "
            "bus='0x00' slot='0x01' function='0x0'/></source></hostdev>",
        ),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    try:
        (entry,) = doctor()[1]["conflict"]
        assert entry["severity"] == "warning"
        assert entry["evidence"] == f"{file}, {domain}"
    finally:
        os.unlink(file)
        os.unlink(domain)
    assert severity("conflict") == "ok"
