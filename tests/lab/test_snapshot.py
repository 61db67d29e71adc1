"""A snapshot against the host it was taken on: every reading command, byte for byte."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.reading import reading_commands, run
from vfiotool.host.host import Host
from vfiotool.lab.inside.scenes import wait_for
from vfiotool.snapshot.load import load, open_root
from vfiotool.snapshot.text import format_snapshot

MACHINE = "sriov"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

PF = "0000:01:00.0"
VF = "0000:01:00.1"
LPC = "0000:00:1f.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
MTTY = Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create")


def disks_of(address: str) -> list[str]:
    """The names of an NVMe function's disks; with native multipath they hang below a subsystem.

    Empty until the driver, which probes in a work item, has found them.
    """
    driver = Path(f"/sys/bus/pci/devices/{address}/nvme")
    controller = next(iter(driver.iterdir() if driver.is_dir() else ()), None)
    if controller is None:
        return []
    folders = [controller, *Path("/sys/class/nvme-subsystem").glob(f"*/{controller.name}/..")]
    for link in Path("/sys/class/nvme-subsystem").glob(f"*/{controller.name}"):
        folders.append(link.parent)
    return [p.name for folder in folders for p in folder.glob("nvme*n1") if "c" not in p.name]


def disk_of(address: str) -> str:
    """The function's disk, once it is there."""
    assert wait_for(lambda: bool(disks_of(address))), f"nvme did not take {address}"
    return disks_of(address)[0]


@pytest.fixture(scope="module")
def busy_host() -> Iterator[None]:
    """A bound VF, an mdev, a mounted disk and an open node: something of each."""
    subprocess.run(["modprobe", "-a", "vfio-pci", "ext4"], check=True)
    subprocess.run(["modprobe", "mtty"], check=False, capture_output=True)
    disk = disk_of(PF)
    Path(f"/sys/bus/pci/devices/{PF}/sriov_drivers_autoprobe").write_text("0")
    Path(f"/sys/bus/pci/devices/{PF}/sriov_numvfs").write_text("2")
    (Path(f"/sys/bus/pci/devices/{VF}") / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(VF)
    if MTTY.exists():
        MTTY.write_text(UUID)
    mount = Path("/tmp/mounted")
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", f"/dev/{disk}"], check=True)
    subprocess.run(["mount", f"/dev/{disk}", str(mount)], check=True)
    with open("/dev/nvme0", "rb") as held:
        holder = subprocess.Popen(["sleep", "600"], stdin=held)
        yield
        holder.kill()
        holder.wait()
    subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture(scope="module")
def snapshot(busy_host: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("snapshot") / "host.gz"
    code, _ = run(["snapshot", str(file)])
    assert code == 0
    return str(file)


def test_every_reading_command_prints_the_same_from_the_snapshot(snapshot: str) -> None:
    commands = reading_commands(Host.local())
    mdevs = {UUID} if MTTY.exists() else set()
    assert {f"why/{device}" for device in (PF, VF, LPC, *mdevs)} <= commands.keys()
    # The lab's own four devices are alike, and each question takes a second or more in here.
    asked = {n: c for n, c in commands.items() if not re.search(r":1e\.[1-9]$", n)}
    different = []
    for name, command in asked.items():
        live, kept = run(command), run(command, snapshot)
        if live != kept:
            different.append(f"{name}\n  live {live}\n  kept {kept}")
    assert not different, "\n".join(different)


def test_the_snapshot_tells_what_is_in_use(snapshot: str) -> None:
    code, text = run(["why", PF], snapshot)
    kinds = {blocker["kind"] for blocker in json.loads(text)["blockers"]}
    assert code == 1 and {"mounted", "vfs-enabled", "open-file"} <= kinds


def test_taken_twice_in_a_row_it_differs_in_nothing_that_commands_print(
    snapshot: str, tmp_path: Path
) -> None:
    second = str(tmp_path / "second.txt")
    run(["snapshot", second])
    code, text = run(["snapshot", "diff", snapshot, second])
    changed = [change["path"] for change in json.loads(text)["changes"]]
    assert (code, changed) == (0, [])


def test_a_diff_names_what_was_done_between_two_captures(snapshot: str, tmp_path: Path) -> None:
    Path(f"/sys/bus/pci/devices/{VF}/driver/unbind").write_text(VF)
    try:
        second = str(tmp_path / "second.gz")
        run(["snapshot", second])
    finally:
        Path("/sys/bus/pci/drivers_probe").write_text(VF)
    code, text = run(["snapshot", "diff", snapshot, second])
    changes = {change["path"]: change for change in json.loads(text)["changes"]}
    driver = next(change for path, change in changes.items() if path.endswith(f"{VF}/driver"))
    assert code == 1
    assert driver["before"].endswith("/vfio-pci") and driver["after"] is None


def test_an_anonymized_snapshot_keeps_the_answers_and_loses_the_names(
    snapshot: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "anonymous.gz")
    assert run(["snapshot", file, "--anonymize"])[0] == 0
    assert run(["groups"], file)[0] == run(["groups"], snapshot)[0]
    before = json.loads(run(["devices"], snapshot)[1])["devices"]
    after = json.loads(run(["devices"], file)[1])["devices"]
    assert [d["driver"] for d in after] == [d["driver"] for d in before]
    text = format_snapshot(load(file))
    for secret in ("lab-nvme-0", UUID, "52:54:00:00:02:00"):
        assert secret not in text
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot_id not in text


def test_a_snapshot_cannot_be_changed(snapshot: str) -> None:
    code, text = run(["bind", VF, "--driver", "none"], snapshot)
    assert code == 2 and json.loads(text)["error"]["kind"] == "usage"


def test_without_root_a_snapshot_is_taken_and_says_what_it_could_not_read(tmp_path: Path) -> None:
    file = tmp_path / "user.txt"
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    # The interpreter may live where only root can read: import all before the change of user.
    script = (
        "import os, sys; from vfiotool.cli.main import main;"
        "main(['snapshot', '/tmp/as-root.gz']); os.setgid(65534); os.setuid(65534);"
        "sys.exit(main(['snapshot', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    config = load(str(file)).files[f"/sys/devices/pci0000:00/{LPC}/config"]
    assert isinstance(config, bytes) and len(config) == 64
    assert open_root(str(file)).exists(f"/sys/bus/pci/devices/{LPC}")
