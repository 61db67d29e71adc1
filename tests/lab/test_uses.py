"""Real uses that begin in the middle of a change: a mount, an address, a route, an open device.

What the fake kernel's sweep (tests/change/test_uses.py) shows of every write is shown here of some,
with real file systems and interfaces: they still work at the end, and whoever changes is told.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.change.changing import binding, do, releasing
from tests.lab.commands import Ran, driver_of, modprobe, override_of, restore, vfiotool
from tests.lab.test_crash import KillingTree, in_child
from tests.lab.test_held import HOLD, asked_to_unbind
from vfiotool.change.journal import RUN_FOLDER, Journal
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.12",)

EDU, TESTDEV, NVME, NIC, VF = (
    "0000:00:01.0",
    "0000:00:02.0",
    "0000:03:00.0",
    "0000:02:00.0",
    "0000:02:10.0",
)
PCI = "/sys/bus/pci"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def disk() -> str | None:
    """The node of the NVMe disk, once its driver has it."""
    for path in Path(f"{PCI}/devices/{NVME}").glob("nvme/nvme*/nvme*"):
        # With multipathing the controller shows a hidden path (nvme0c0n1) to the disk.
        found = re.fullmatch(r"(nvme\d+)(c\d+)?(n\d+)", path.name)
        node = f"{found[1]}{found[3]}" if found else ""
        size = Path(f"/sys/class/block/{node}/size")
        if found and os.path.exists(f"/dev/{node}") and size.read_text().strip() != "0":
            return f"/dev/{node}"
    return None


def give_to_host(address: str, driver: str) -> None:
    """What an operator types who wants the device back, whatever vfiotool was about."""
    host = Host.local()
    host.write_attribute(f"{PCI}/devices/{address}/driver_override", "\n")
    if driver_of(address) is not None:
        host.write_attribute(f"{PCI}/drivers/{driver_of(address)}/unbind", address)
    host.write_attribute(f"{PCI}/drivers/{driver}/bind", address)


class Mounted:
    """A file system on the disk, which must take a write at the end."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self) -> None:
        wait_for(disk)
        run("mount", disk() or "", str(self.place))

    def check(self) -> None:
        assert driver_of(NVME) == "nvme"
        with open(self.place / "written", "w") as file:
            file.write("still there")
            file.flush()
            os.fsync(file.fileno())


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    modprobe("vfio-pci")
    wait_for(disk)
    run("mkfs.ext4", "-qF", disk() or "")
    yield Mounted(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=False, capture_output=True)
    put_back()


@pytest.fixture
def guest() -> Iterator[None]:
    """Put everything back afterwards."""
    modprobe("vfio-pci")
    yield
    put_back()


@pytest.fixture
def vf() -> Iterator[str]:
    """The interface of a VF that the host's driver has."""
    modprobe("igbvf", "vfio-pci")
    assert vfiotool("vf", "set", NIC, "1", "--autoprobe").code == 0
    wait_for(lambda: list(Path(f"{PCI}/devices/{VF}").glob("net/*")))
    (found,) = Path(f"{PCI}/devices/{VF}").glob("net/*")
    yield found.name
    put_back()


def put_back() -> None:
    subprocess.run(["rm", "-rf", RUN_FOLDER], check=False)
    restore(Host.local())


def killed(at: int, make: Callable[..., object], moment: str = "after") -> None:
    """A change that `kill -9` ends at its write of that number."""
    code = in_child(
        lambda host: do(host, Journal(host), make),  # type: ignore[arg-type]
        KillingTree(at, moment),
    )
    assert code == signal.SIGKILL


def held(address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, address]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


def allowing(*arguments: str) -> tuple[str, ...]:
    """The command with what its refusal says would permit it."""
    refused = vfiotool(*arguments, "--json")
    assert refused.code == 4, refused
    words = refused.json["error"]["hint"].split()
    return (*arguments, *(word for word in words if word.startswith(("--allow", "open-file"))))


def in_background(*arguments: str) -> subprocess.Popen[str]:
    """A command of its own, once it has begun to change something."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-m", "vfiotool", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: list(Path(RUN_FOLDER).glob("boot-*/*.open")), 60)
    return child


def test_recover_leaves_a_disk_that_came_into_use(mounted: Mounted) -> None:
    killed(2, binding(NVME))
    give_to_host(NVME, "nvme")
    mounted.mount()
    done = vfiotool("recover")
    mounted.check()
    assert done.code in (0, 6)
    # Told to go on, it names the mount and does not begin.
    if done.code == 6:
        assert "mounted" in done.out + done.err


@pytest.mark.parametrize("direction", ["--finish", "--undo"])
def test_recover_refuses_a_direction_that_would_take_a_mounted_disk(
    mounted: Mounted, direction: str
) -> None:
    if direction == "--finish":
        killed(1, binding(NVME))
    else:
        assert vfiotool("bind", NVME).code == 0
        killed(3, releasing(NVME))
        give_to_host(NVME, "nvme")
    mounted.mount()
    done = vfiotool("recover", direction)
    mounted.check()
    assert done.code == 4, done
    assert f"mounted:{mounted.place}" in done.err


def test_recover_stops_before_a_second_device_that_came_into_use(mounted: Mounted) -> None:
    assert vfiotool("bind", EDU).code == 0
    child = held(EDU)
    try:
        words = allowing("bind", EDU, NVME, "--driver", "none")
        assert vfiotool(*words, "--timeout", "3").code == 6
        mounted.mount()
    finally:
        end(child)
    done = vfiotool("recover")
    mounted.check()
    assert (done.code, driver_of(EDU)) == (0, "vfio-pci"), done
    assert "mounted" in done.out


def test_a_change_stops_before_a_second_device_that_came_into_use(mounted: Mounted) -> None:
    assert vfiotool("bind", EDU).code == 0
    child = held(EDU)
    try:
        words = allowing("bind", EDU, NVME, "--driver", "none")
        waiting = in_background(*words, "--timeout", "60")
        mounted.mount()
    finally:
        end(child)
    said, _ = waiting.communicate(timeout=120)
    mounted.check()
    assert waiting.returncode == 4, said
    assert "mounted" in said
    assert driver_of(EDU) == "vfio-pci"


def test_a_second_signal_leaves_what_recover_undoes(guest: None) -> None:
    assert vfiotool("bind", EDU).code == 0
    before = (driver_of(EDU), override_of(EDU))
    child = held(EDU)
    try:
        words = allowing("bind", EDU, "--driver", "none")
        waiting = in_background(*words, "--timeout", "100")
        wait_for(lambda: asked_to_unbind(EDU))
        for _ in range(2):
            waiting.send_signal(signal.SIGTERM)
            time.sleep(1)
        waiting.communicate(timeout=60)
        assert waiting.returncode == 6
    finally:
        end(child)
    done = vfiotool("recover", "--json")
    assert done.code == 0, done
    assert [entry["result"] for entry in done.json["recovered"]] == ["undone"]
    assert (driver_of(EDU), override_of(EDU)) == before


def test_the_watcher_leaves_a_disk_that_came_into_use(mounted: Mounted, tmp_path: Path) -> None:
    assert vfiotool("bind", NVME).code == 0
    policy = tmp_path / "p.toml"
    policy.write_text(
        f'version = 1\n[[device]]\nmatch = {{ address = "{NVME}" }}\ndriver = "nvme"\n'
    )
    applied = vfiotool("apply", str(policy), "--confirm-within", "4")
    assert applied.code == 0, applied
    mounted.mount()
    wait_for(lambda: "rolling it back failed" in vfiotool_confirm_state(), 60)
    mounted.check()
    assert vfiotool("confirm").code == 0


def vfiotool_confirm_state() -> str:
    return " ".join(path.read_text() for path in Path(RUN_FOLDER).glob("boot-*/pending/*"))


def test_a_stopped_apply_is_rolled_back_at_its_deadline(guest: None, tmp_path: Path) -> None:
    assert vfiotool("bind", EDU).code == 0
    child = held(EDU)
    policy = tmp_path / "p.toml"
    policy.write_text(
        f'version = 1\n[[device]]\nmatch = {{ address = "{TESTDEV}" }}\n'
        f'[[device]]\nmatch = {{ address = "{EDU}" }}\ndriver = "none"\n'
    )
    words = allowing("apply", str(policy))
    stopped = in_background(*words, "--confirm-within", "5", "--timeout", "100")
    try:
        wait_for(lambda: asked_to_unbind(EDU))
        stopped.send_signal(signal.SIGSTOP)
    finally:
        end(child)
    wait_for(lambda: not list(Path(RUN_FOLDER).glob("boot-*/*.open")), 120)
    stopped.communicate(timeout=60)
    # The watcher ends the process before it reverts what that has done.
    wait_for(lambda: (driver_of(TESTDEV), driver_of(EDU)) == (None, "vfio-pci"), 60)


def test_undo_of_vf_set_refuses_while_a_vf_has_an_address(vf: str) -> None:
    run("ip", "addr", "add", "10.9.9.1/24", "dev", vf)
    for done in (vfiotool("vf", "set", NIC, "0"), vfiotool("undo")):
        assert done.code == 4, done
        assert f"route:{vf}" in done.err
    assert "10.9.9.1" in run("ip", "-br", "addr", "show", "dev", vf)
    assert vfiotool("undo", "--allow", f"route:{vf}").code == 0
    assert not os.path.exists(f"{PCI}/devices/{VF}")


def test_settings_of_a_vf_in_use_are_refused(vf: str, tmp_path: Path) -> None:
    run("ip", "addr", "add", "10.9.9.1/24", "dev", vf)
    run("ip", "link", "set", vf, "up")
    run("ip", "route", "add", "default", "via", "10.9.9.2", "dev", vf)
    policy = tmp_path / "p.toml"
    policy.write_text(
        f'version = 1\n[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 1\n'
        "vf = [ { index = 0, vlan = 10 } ]\n"
    )
    done = vfiotool("apply", str(policy))
    assert done.code == 4, done
    assert f"route:{vf}" in done.err
    (owner,) = Path(f"{PCI}/devices/{NIC}").glob("net/*")
    assert "vlan 10" not in run("ip", "link", "show", "dev", owner.name)
    run("ip", "route", "del", "default", "via", "10.9.9.2", "dev", vf)


def test_release_of_a_held_device_is_refused_unless_allowed(guest: None) -> None:
    assert vfiotool("bind", EDU).code == 0
    child = held(EDU)
    try:
        done: Ran = vfiotool("release", EDU)
        assert done.code == 4, done
        assert driver_of(EDU) == "vfio-pci"
        assert f"pid {child.pid}" in done.err
    finally:
        end(child)
    assert vfiotool("release", EDU).code == 0


def test_a_device_without_driver_whose_registers_are_open_is_refused(guest: None) -> None:
    hold = "import sys; file = open(sys.argv[1], 'rb'); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, f"{PCI}/devices/{EDU}/resource0"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        done = vfiotool("bind", EDU)
        assert done.code == 4, done
        assert "open-file" in done.err
    finally:
        end(child)
    assert vfiotool("bind", EDU).code == 0
