"""`watch` on a running host: every kind of event, in order, and none lost in a burst."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfiotool.host.host import Host
from vfiotool.host.monitor import Monitor

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

EDU, PF = "0000:00:01.0", "0000:01:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003"
PCI = Path("/sys/bus/pci")


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`vfiotool watch`, from the moment on at which it watches."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vfiotool", "watch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None and process.stderr.readline() == "watching\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def events(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=60)
    return [json.loads(line) for line in out.splitlines()]


def bind_edu() -> None:
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    (PCI / "devices" / EDU / "driver_override").write_text("vfio-pci")
    (PCI / "drivers_probe").write_text(EDU)


def unbind_edu() -> None:
    (PCI / "drivers" / "vfio-pci" / "unbind").write_text(EDU)


def test_bind_and_unbind_are_told_with_their_drivers() -> None:
    with watching("--json", "--count", "2", "--timeout", "60") as process:
        bind_edu()
        unbind_edu()
        found = events(process)
    assert process.returncode == 0
    shown = [(e["event"], e["device"], e["driver"], e["previous_driver"]) for e in found]
    assert shown == [("bind", EDU, "vfio-pci", None), ("unbind", EDU, None, "vfio-pci")]
    assert found[0]["time"] <= found[1]["time"]


def test_an_event_that_somebody_asked_for_is_none() -> None:
    """`udevadm trigger` has the kernel announce every device anew."""
    bind_edu()
    with Monitor(Host.local()) as monitor:
        for action in ("add", "remove", "bind"):
            (PCI / "devices" / EDU / "uevent").write_text(action)
        unbind_edu()
        found = next(event for event in monitor.events(60) if event.device == EDU)
    assert (found.kind, found.previous_driver) == ("unbind", "vfio-pci")


def test_people_get_one_line_an_event() -> None:
    with watching("--count", "2", "--timeout", "60", EDU) as process:
        bind_edu()
        unbind_edu()
        out, _ = process.communicate(timeout=60)
    first, second = out.splitlines()
    assert f"> bind        {EDU} to vfio-pci" in first
    assert f"< unbind      {EDU} from vfio-pci" in second


def test_virtual_functions_come_and_go_with_their_index() -> None:
    numvfs = PCI / "devices" / PF / "sriov_numvfs"
    autoprobe = PCI / "devices" / PF / "sriov_drivers_autoprobe"
    autoprobe.write_text("0")
    try:
        with Monitor(Host.local()) as monitor:
            found = {}
            for count, wanted in (("2", 2), ("0", 4)):
                numvfs.write_text(count)
                for event in monitor.events(60):
                    if event.pf == PF:
                        found[event.kind, event.vf_index] = event.device
                    if len(found) == wanted:
                        break
    finally:
        autoprobe.write_text("1")
    assert set(found) == {("vf-add", 0), ("vf-add", 1), ("vf-remove", 0), ("vf-remove", 1)}
    assert found["vf-add", 1] == found["vf-remove", 1]


def test_a_mediated_device_is_told_with_its_parent() -> None:
    create = Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create")
    if not create.exists():
        pytest.skip("this kernel has no mtty")
    with Monitor(Host.local()) as monitor:
        create.write_text(UUID)
        made = monitor.wait_for(lambda event: event.kind == "mdev-add", 60)
        Path(f"/sys/bus/mdev/devices/{UUID}/remove").write_text("1")
        gone = monitor.wait_for(lambda event: event.kind == "mdev-remove", 60)
    assert made is not None and (made.device, made.parent) == (UUID, "mtty")
    assert gone is not None and gone.device == UUID


def test_a_burst_loses_nothing_even_when_nobody_reads_meanwhile() -> None:
    bind_edu()
    rounds = 300
    with Monitor(Host.local()) as monitor:
        for _ in range(rounds):
            unbind_edu()
            (PCI / "drivers_probe").write_text(EDU)
        kinds = []
        for event in monitor.events(60):
            kinds.append(event.kind)
            if len(kinds) == 2 * rounds:
                break
    unbind_edu()
    assert kinds == ["unbind", "bind"] * rounds


def test_when_the_kernel_drops_events_the_end_is_right_all_the_same() -> None:
    """Uevents of a small socket buffer overflow; the state found by comparing is the true one."""
    bind_edu()
    with Monitor(Host.local()) as monitor:
        shrink_buffer(monitor.fileno())
        for _ in range(200):
            unbind_edu()
            (PCI / "drivers_probe").write_text(EDU)
        unbind_edu()
        found = list(monitor.events(5))
    assert [event.kind for event in found].count("lost") >= 1
    assert len(found) < 401
    assert [event for event in found if event.device == EDU][-1].driver is None


def shrink_buffer(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as handle:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


def test_events_arrive_while_another_thread_changes_the_host() -> None:
    bind_edu()

    def change() -> None:
        for _ in range(50):
            unbind_edu()
            (PCI / "drivers_probe").write_text(EDU)

    with Monitor(Host.local()) as monitor:
        thread = threading.Thread(target=change)
        thread.start()
        seen = 0
        for event in monitor.events(60):
            seen += event.device == EDU
            if seen == 100:
                break
        thread.join()
    unbind_edu()
    assert seen == 100
