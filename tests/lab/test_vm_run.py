"""The devices that `vm qemu` prints options for: a QEMU within the guest boots with all of them,
twice, a small guest in it reads data through each, and this host has them back afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab import commands
from tests.lab.commands import driver_of, modprobe
from tests.lab.nvme_guest import block_device
from tests.lab.vfio_guest import EDU, PCI

MACHINE = "full"
KERNELS = ("6.12",)
PROOF = "long: an emulated guest within an emulated guest"
LIMIT_S = 5400.0

NVME, PF, VF = "0000:03:00.0", "0000:02:00.0", "0000:02:10.0"
MDEV = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
MAC = "52:54:00:aa:bb:01"
EDU_IDENTIFICATION = "0x010000ED"
# mtty gives back what is written to it (kernel: Documentation/driver-api/vfio-mediated-device.rst).
SERIAL = """
for tty in /sys/class/tty/ttyS*; do
    case "$(readlink -f "$tty")" in */0000:00:1b.*)
        port=/dev/${tty##*/}
        stty -F "$port" raw -echo -crtscts
        exec 4<>"$port"
        echo through-mtty >&4
        IFS= read -r -t 20 line <&4 && echo "$port gave $line"
        exit
    esac
done
echo no serial port
"""


def vfiotool(*words: str, code: int | None = 0) -> str:
    """A command's output, from this process: loading Python anew each time takes long here."""
    ran = commands.vfiotool(*words)
    assert code in (None, ran.code), ran.out + ran.err
    return ran.out


def wait_until(what: Callable[[], object], limit_s: float = 600.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.1)


def head_digest(data: bytes) -> str:
    return hashlib.sha256(data[:4096]).hexdigest()


@contextmanager
def served(*words: str, ready: Path) -> Iterator[None]:
    """`vfiotool serve …` in the background, until the end of the block."""
    process = subprocess.Popen([sys.executable, "-m", "vfiotool", "serve", *words])
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None, f"serve {words[0]} ended with {process.returncode}"
        yield
    finally:
        process.terminate()
        process.wait(60)


class Devices:
    """All kinds at once, each with data of its own. `names` are the selectors, `digests` of the
    disks' first 4 KiB by selector."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.names: list[str] = [EDU]
        self.digests: dict[str, str] = {}
        vfiotool("bind", EDU)
        stack.callback(vfiotool, "release", EDU)
        self._nvme(stack)
        self._vf(stack)
        vfiotool("mdev", "create", "mtty", "mtty-2", "--uuid", MDEV)
        stack.callback(vfiotool, "mdev", "remove", MDEV)
        self.names.append(MDEV)
        self._sockets(stack, folder)

    def _nvme(self, stack: ExitStack) -> None:
        modprobe("nvme")
        data = os.urandom(65536)
        block_device(NVME).write_bytes(data)
        self.written = data
        vfiotool("bind", NVME)
        stack.callback(vfiotool, "release", NVME)
        self.names.append(NVME)
        self.digests[NVME] = head_digest(data)

    def _vf(self, stack: ExitStack) -> None:
        if not (PCI / PF).exists():
            pytest.skip("this QEMU has no igb")
        vfiotool("vf", "set", PF, "1")
        stack.callback(vfiotool, "vf", "set", PF, "0")
        interface = next((PCI / PF / "net").iterdir()).name
        subprocess.run(["ip", "link", "set", interface, "vf", "0", "mac", MAC], check=True)
        # A PF that is down does not answer its VFs, which then make up an address.
        subprocess.run(["ip", "link", "set", interface, "up"], check=True)
        stack.callback(subprocess.run, ["ip", "link", "set", interface, "down"], check=True)
        vfiotool("bind", VF)
        stack.callback(vfiotool, "release", VF)
        self.names.append(VF)

    def _sockets(self, stack: ExitStack, folder: Path) -> None:
        modprobe("vduse", "vhost_vdpa")
        for name in ("vm1", "vd0"):
            data = os.urandom(1 << 20)
            (folder / f"{name}.raw").write_bytes(data)
            self.digests[name] = head_digest(data)
        image, socket = str(folder / "vm1.raw"), folder / "vm1.sock"
        words = ("vhost-user-blk", "--socket-path", str(socket), "--blk-file", image)
        stack.enter_context(served(*words, ready=socket))
        node = Path("/dev/vhost-vdpa-0")
        words = ("vduse-blk", "vd0", "--blk-file", str(folder / "vd0.raw"), "--attach", "vhost")
        stack.enter_context(served(*words, ready=node))
        # It outlives its server, which may be followed by another.
        stack.callback(vfiotool, "vdpa", "remove", "vd0")
        self.names += [f"vhost-user-blk:{socket}", "vdpa:vd0"]
        self.digests[str(socket)] = self.digests.pop("vm1")


@dataclass
class Result:
    """What `vm run` said, what `vm qemu` had printed, and how the host was after the tear-down."""

    ran: dict[str, Any]
    printed: list[str]
    digests: dict[str, str]
    written: bytes
    read_back: bytes
    drivers: dict[str, str | None]
    left: list[str]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    words = ("--memory", "256M", "--times", "2", "--timeout", "1500", "--command", SERIAL)
    with ExitStack() as stack:
        devices = Devices(stack, tmp_path_factory.mktemp("disks"))
        printed = shlex.split(vfiotool("vm", "qemu", *devices.names, "--memory", "256M"))
        text = vfiotool("--json", "vm", "run", *devices.names, *words, code=None)
    print(text)
    disk = block_device(NVME)
    places = [PCI / VF, Path(f"/sys/bus/mdev/devices/{MDEV}"), Path("/sys/bus/vdpa/devices/vd0")]
    return Result(
        json.loads(text),
        printed,
        devices.digests,
        devices.written,
        disk.read_bytes()[:65536],
        {name: driver_of(name) for name in (EDU, NVME, PF)},
        [str(place) for place in places if place.exists()],
    )


def test_both_starts_come_to_their_end_and_see_every_device(result: Result) -> None:
    assert len(result.ran["boots"]) == 2
    for boot in result.ran["boots"]:
        assert boot["booted"], boot
        assert all(one["seen"] for one in boot["devices"]), boot["devices"]
    assert result.ran["good"]


def test_what_was_started_is_what_vm_qemu_prints(result: Result) -> None:
    assert result.ran["command"][-len(result.printed) :] == result.printed


def test_data_is_read_through_each_device_both_times(result: Result) -> None:
    for boot in result.ran["boots"]:
        seen = {one["device"]: one["seen"] for one in boot["devices"]}
        assert seen[EDU]["register"] == {"bar": 0, "width": 32, "value": EDU_IDENTIFICATION}
        for name, digest in result.digests.items():
            assert [disk["sha256"] for disk in seen[name]["disks"]] == [digest], name
        assert seen[VF]["driver"] == "igbvf"
        assert [one["mac"] for one in seen[VF]["interfaces"]] == [MAC]
        assert "gave through-mtty" in " ".join(boot["command"]["output"])


def test_the_devices_are_ready_for_the_next_machine(result: Result) -> None:
    assert all(one["ready"] and not one["changes"] for one in result.ran["afterwards"])


def test_the_host_has_its_devices_back(result: Result) -> None:
    assert result.drivers == {EDU: None, NVME: "nvme", PF: "igb"}
    assert result.read_back == result.written
    assert not result.left
