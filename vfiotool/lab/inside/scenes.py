"""The demonstration's scenes, run inside a guest by `python -m vfiotool.lab.inside.scenes`.

Each scene prints the commands it runs, runs them as a user would, and checks what they did by
looking at sysfs itself. It ends with 1 if any scene failed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
EDU = "0000:00:01.0"
SRIOV_DISK = "0000:01:00.0"
PLAIN_DISK = "0000:03:00.0"
SHARED_EDU = "0000:05:01.0"
SHARED_TESTDEV = "0000:05:02.0"
MOUNT_POINT = Path("/run/data")
MDEV_PARENT = Path("/sys/class/mdev_bus/mtty")
MDEV_UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"

BOLD, DIM, GREEN, RED, CYAN, PLAIN = (f"\x1b[{code}m" for code in (1, 2, 32, 31, 36, 0))


class SceneFailed(Exception):
    """A command or a check of a scene gave something else than it should."""


@dataclass(frozen=True)
class Scene:
    """One scene: what the spectator learns, and the function that plays it."""

    title: str
    play: Callable[[Stage], None]
    # What the guest must have for it, if not every guest has it.
    needs: Path | None = None


class Stage:
    """Runs commands in front of the spectator and checks what they did."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def paint(self, text: str, *codes: str) -> str:
        return f"{''.join(codes)}{text}{PLAIN}" if self._colour else text

    def say(self, text: str) -> None:
        print(self.paint(text, DIM), flush=True)

    def run(self, command: str, *, expect: int = 0) -> str:
        """Show `command`, run it, and fail the scene unless its exit code is `expect`.

        Returns what it printed (both streams), which the spectator has seen line by line.
        """
        print(f"{self.paint('$', CYAN)} {self.paint(command, BOLD)}", flush=True)
        environment = {**os.environ, **({"FORCE_COLOR": "1"} if self._colour else {})}
        lines = []
        with subprocess.Popen(
            shlex.split(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as child:
            # A command that is stuck ends with the guest, whose limit the demonstration sets.
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                print(line, end="", flush=True)
        if child.returncode != expect:
            raise SceneFailed(f"`{command}` ended with {child.returncode}, not {expect}")
        if expect:
            self.say(f"(exit code {expect})")
        return "".join(lines)

    def check(self, what: str, holds: bool) -> None:
        """Print `what` with a mark; fail the scene unless it `holds`."""
        mark = self.paint("✓", GREEN) if holds else self.paint("✗", RED)
        print(f"  {mark} {what}", flush=True)
        if not holds:
            raise SceneFailed(what)


def driver_of(address: str) -> str | None:
    """The driver that the kernel has on a device now, read past vfiotool."""
    link = PCI / address / "driver"
    return os.readlink(link).rpartition("/")[2] if link.is_symlink() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def host_state() -> dict[str, object]:
    """What vfiotool can change on this host, read from sysfs and /proc past vfiotool."""
    functions = {
        path.name: {
            "driver": driver_of(path.name),
            "override": _read(path / "driver_override"),
            "vfs": _read(path / "sriov_numvfs"),
            "autoprobe": _read(path / "sriov_drivers_autoprobe"),
            "group": os.path.realpath(path / "iommu_group").rpartition("/")[2],
        }
        for path in sorted(PCI.iterdir())
    }
    mdevs = Path("/sys/bus/mdev/devices")
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return {
        "functions": functions,
        "mdevs": sorted(path.name for path in mdevs.iterdir()) if mdevs.is_dir() else [],
        "block": sorted(path.name for path in Path("/sys/block").iterdir()),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "mounts": sorted(mounts),
    }


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
    """Whether `condition` comes true within `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _disk_of(address: str) -> str:
    """The namespace's block device of an NVMe controller, e.g. nvme1n1."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [
            path.name
            for path in Path("/sys/block").iterdir()
            if re.fullmatch(r"nvme\d+n\d+", path.name)  # not a path of its, nvme0c0n1
            if address in os.path.realpath(path) or _below_subsystem(path, address)
        ]
        return bool(found)

    if not wait_for(look):
        raise SceneFailed(f"the NVMe disk {address} did not appear")
    return found[0]


def _below_subsystem(block: Path, address: str) -> bool:
    """With native multipath a namespace belongs to its subsystem, which lists controllers."""
    controllers = Path(os.path.realpath(block / "device")).glob("nvme*")
    return any(address in os.path.realpath(path) for path in controllers)


def prepare() -> None:
    """Put a file system with a file on the plain disk, as an operator's data would be."""
    disk = f"/dev/{_disk_of(PLAIN_DISK)}"
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    MOUNT_POINT.mkdir(exist_ok=True)
    subprocess.run(["mount", disk, str(MOUNT_POINT)], check=True)
    (MOUNT_POINT / "letter").write_text("somebody's only copy\n" * 1000)
    os.sync()


def _letter() -> str:
    # Past the page cache: the disk itself must still answer.
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return hashlib.sha256((MOUNT_POINT / "letter").read_bytes()).hexdigest()


def look(stage: Stage) -> None:
    shown = stage.run("vfiotool groups")
    functions = [path.name for path in PCI.iterdir()]
    stage.check(f"all {len(functions)} functions are listed", all(f in shown for f in functions))
    shared = [
        {path.name for path in (PCI / address / "iommu_group" / "devices").resolve().iterdir()}
        for address in (SHARED_EDU, SHARED_TESTDEV)
    ]
    stage.check(
        f"the kernel has {SHARED_EDU} and {SHARED_TESTDEV} in one group", shared[0] == shared[1]
    )


def ask_why(stage: Stage) -> None:
    stage.run(f"vfiotool why {EDU}")
    shown = stage.run(f"vfiotool why {PLAIN_DISK}", expect=1)
    stage.check(f"it names the file system on {MOUNT_POINT}", str(MOUNT_POINT) in shown)


def refuse(stage: Stage) -> None:
    before = _letter()
    stage.run(f"vfiotool bind {PLAIN_DISK}", expect=4)
    stage.check(f"{PLAIN_DISK} is still on nvme", driver_of(PLAIN_DISK) == "nvme")
    stage.check("the file on it reads as before", _letter() == before)


def drive_edu(stage: Stage) -> None:
    stage.run(f"vfiotool bind {EDU}")
    stage.check(f"the kernel has vfio-pci on {EDU}", driver_of(EDU) == "vfio-pci")
    stage.run(f"vfiotool device info {EDU}")
    stage.run(f"vfiotool device read {EDU} 0 0")
    stage.run(f"vfiotool demo edu {EDU}")


def drive_shared_group(stage: Stage) -> None:
    stage.run(f"vfiotool bind --whole-group {SHARED_TESTDEV}")
    for address in (SHARED_EDU, SHARED_TESTDEV):
        stage.check(f"the kernel has vfio-pci on {address}", driver_of(address) == "vfio-pci")
    stage.run(f"vfiotool demo pci_testdev {SHARED_TESTDEV}")


def make_vfs(stage: Stage) -> None:
    stage.run(f"vfiotool vf set {SRIOV_DISK} 2")
    stage.run(f"vfiotool vf list {SRIOV_DISK}")
    stage.check(
        "the kernel shows two VFs",
        _read(PCI / SRIOV_DISK / "sriov_numvfs") == "2"
        and (PCI / SRIOV_DISK / "virtfn1").is_symlink(),
    )
    vf = os.readlink(PCI / SRIOV_DISK / "virtfn0").rpartition("/")[2]
    stage.run(f"vfiotool bind {vf}")
    stage.check(f"the kernel has vfio-pci on {vf}", driver_of(vf) == "vfio-pci")
    stage.run(f"vfiotool release {vf}")


def talk_to_mdev(stage: Stage) -> None:
    stage.run("vfiotool mdev types")
    stage.run(f"vfiotool mdev create mtty mtty-2 --uuid {MDEV_UUID}")
    device = Path("/sys/bus/mdev/devices") / MDEV_UUID
    stage.check("the kernel has the mediated device", device.exists())
    stage.run(f"vfiotool demo mtty {MDEV_UUID}")


def give_back(stage: Stage) -> None:
    if MDEV_PARENT.exists():
        stage.run(f"vfiotool mdev remove {MDEV_UUID}")
    stage.run(f"vfiotool vf set {SRIOV_DISK} 0")
    stage.run(f"vfiotool release {EDU} {SHARED_EDU} {SHARED_TESTDEV}")


SCENES = (
    Scene("Look: IOMMU groups and who is in them", look),
    Scene("Ask: can it be passed through, and why not", ask_why),
    Scene("Refuse: a disk that is in use stays where it is", refuse),
    Scene("Drive: bind a device and run a driver in user space", drive_edu),
    Scene("Share: a whole group behind one bridge", drive_shared_group),
    Scene("Split: virtual functions of an NVMe disk", make_vfs),
    Scene("Mediate: a serial port that software makes", talk_to_mdev, MDEV_PARENT),
    Scene("Give back: everything as it was", give_back),
)


def play(scenes: tuple[Scene, ...], stage: Stage) -> list[str]:
    """Play all scenes, also after one failed; returns the titles of those that did."""
    failed = []
    for number, scene in enumerate(scenes, start=1):
        print(f"\n{stage.paint(f'{number}. {scene.title}', BOLD, CYAN)}", flush=True)
        try:
            scene.play(stage)
        except Exception as error:
            print(f"  {stage.paint('scene failed:', RED, BOLD)} {error}", flush=True)
            failed.append(scene.title)
    return failed


def possible(scenes: tuple[Scene, ...], stage: Stage) -> tuple[Scene, ...]:
    """The scenes that this guest can show; the others are named before the first one."""
    left_out = [scene for scene in scenes if scene.needs is not None and not scene.needs.exists()]
    for scene in left_out:
        stage.say(f"left out, since this kernel has no {scene.needs}: {scene.title}")
    return tuple(scene for scene in scenes if scene not in left_out)


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What differs between two states, one line each."""
    lines = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key} {line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{key}: {old} is now {new}")
    return sorted(lines)


def main() -> int:
    stage = Stage(sys.stdout.isatty())
    prepare()
    before = host_state()
    begin = time.monotonic()
    scenes = possible(SCENES, stage)
    failed = play(scenes, stage)
    changed = differences(before, host_state())
    print()
    for line in changed:
        print(f"  {stage.paint('✗', RED)} {line}")
    if changed:
        failed.append("the guest is as it was before")
    else:
        count = len(before["functions"])  # type: ignore[arg-type]
        text = f"the guest is as it was: drivers, overrides, VFs and groups of {count} functions,"
        print(f"  {stage.paint('✓', GREEN)} {text} mdevs, disks, interfaces, mounts")
    seconds = time.monotonic() - begin
    if failed:
        print(stage.paint(f"\n{len(failed)} failed: {'; '.join(failed)}", RED, BOLD))
        return 1
    print(stage.paint(f"\nAll {len(scenes)} scenes passed in {seconds:.0f} s.", GREEN, BOLD))
    return 0


if __name__ == "__main__":
    sys.exit(main())
