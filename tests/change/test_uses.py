"""The sweep's second dimension: a device comes into use between any two writes of any change.

For each policy, each way in which steps run (forwards, roll-back, undo, recover both ways, the
watcher of --confirm-within, boot), each write of that way and each device of the policy: right
before that write somebody begins to use the device. Whatever it is that comes next, the device
stays as it was when its use began, and the end names it, or did not need it any more.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.change.changing import BEHIND, BESIDE, NIC, NVME, UUID, furnished, run_folder
from tests.change.side_by_side import side_by_side
from tests.change.test_faults import HEAD, NAMES, POLICIES, VFS, furnished_with_vfs
from tests.change.test_faults import run_policy as apply
from tests.fakes.kernel import FakeKernel, Fault
from tests.guests.runs import PROOFS_WANTED
from vfiotool.boot.run import run_policy as boot
from vfiotool.change.confirm import revert_unconfirmed
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal
from vfiotool.change.undo import undo
from vfiotool.errors import KernelError, Refused, Stuck
from vfiotool.host.paths import NET_ADDRESSES, OPEN_NODES
from vfiotool.policy.parse import parse_policy

PCI = "/sys/bus/pci/devices"
WAYS = (
    "forwards",
    "roll-back",
    "undo",
    "recover",
    "recover forwards",
    "recover backwards",
    "watcher",
    "boot",
)
QUICK = ("disk", "group", "mdevs")


class Killed(BaseException):
    """The process is gone; nothing of it runs on."""


def devices_of(kernel: FakeKernel) -> tuple[str, ...]:
    vfs = [name for name in kernel.children.get(PCI, ()) if name.startswith(NIC[:5] + "03")]
    vfs += [name for name in kernel.children.get(PCI, ()) if name.startswith(NIC[:8] + "1")]
    disk_vfs = [name for name in kernel.children.get(PCI, ()) if name[:-1] == NVME[:-1]]
    mdevs = [f"{UUID[:-1]}{digit}" for digit in range(2)]
    return tuple(dict.fromkeys((NVME, BEHIND, BESIDE, *sorted(vfs), *sorted(disk_vfs), *mdevs)))


def place_of(kernel: FakeKernel, device: str) -> str | None:
    """The device's path below /sys, None if it is not there."""
    host = kernel.host()
    folder = PCI if ":" in device else "/sys/bus/mdev/devices"
    return host.realpath(f"{folder}/{device}") if host.exists(f"{folder}/{device}") else None


def condition(kernel: FakeKernel, device: str) -> object:
    """What whoever uses the device would notice: that it is there, its driver, a VF's address."""
    path = place_of(kernel, device)
    if path is None or ":" not in device:
        return path
    info = {key: value for key, value in kernel.vf_info.items() if vf_of(kernel, *key) == device}
    return path, kernel.driver_of(device), info


def vf_of(kernel: FakeKernel, pf: str, index: int) -> str | None:
    return kernel.host().linkname(f"{PCI}/{pf}/virtfn{index}")


def open_node(kernel: FakeKernel, device: str) -> str | None:
    """A program opens a node of the device; returns what the guard has to name."""
    path = place_of(kernel, device)
    if path is None:
        return None
    kernel._put(OPEN_NODES, f"4242\tqemu\t/dev/of-{device}\t{path}\n.\n".encode())
    return device


def give_address(kernel: FakeKernel, device: str) -> str | None:
    """An interface of the device gets an address, while a driver of the host has it."""
    if kernel.driver_of(device) != "e1000":
        return None
    kernel._put(NET_ADDRESSES, b"eth4\t192.0.2.7/24\n.\n")
    return device


def swap_on(kernel: FakeKernel, device: str) -> str | None:
    """The host swaps to the disk."""
    if kernel.driver_of(device) != "nvme":
        return None
    node = f"/sys/devices/pci0000:00/{device}/nvme/nvme0/nvme0n1"
    kernel._put(f"{node}/dev", b"259:0\n")
    kernel._put(f"{node}/size", b"2048\n")
    kernel._link("/sys/class/block/nvme0n1", f"../../{node.removeprefix('/sys/')}")
    kernel._put("/proc/swaps", b"Filename Type Size Used Priority\n/dev/nvme0n1 partition 9 0 -2\n")
    return device


Use = Callable[[FakeKernel, str], str | None]
# Each use, and the one device that can have it if it is not for all.
USES: tuple[tuple[Use, str | None], ...] = (
    (open_node, None),
    (give_address, BESIDE),
    (swap_on, NVME),
)
# After how many writes, which device, and how it comes into use.
Case = tuple[int, str, Use]


@dataclass
class Way:
    """A kernel made ready, what is run on it, and the write from which uses are of interest."""

    kernel: FakeKernel
    journal: Journal
    act: Callable[[], object]
    first: int = 0


def after_writes(kernel: FakeKernel, at: int, act: Callable[[], None]) -> None:
    """Have `act` called once `at` writes from now have been done, and before the next is asked
    for; 0 is right now."""
    if at == 0:
        act()
        return
    left = [at]

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            finally:
                left[0] -= 1
                if left[0] == 0:
                    act()

        return call

    for name in ("write_attribute", "load_module", "send_netlink"):
        setattr(kernel, name, watched(getattr(kernel, name)))


def ready(name: str, way: str, folder: str) -> Way:
    """The kernel and what to run on it, with everything done that comes before that way."""
    policy = parse_policy(HEAD + POLICIES.get(name, VFS))
    first, files = begun(name, before_way(way))
    kernel = first.copy()
    for path, content in files.items():
        (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / path).write_bytes(content)
    journal = Journal(kernel.host(), folder)
    if way == "forwards":
        return Way(kernel, journal, lambda: apply(kernel, journal, policy))
    if way == "boot":
        return Way(kernel, journal, lambda: boot(kernel.host(), policy, run_folder=folder))
    if way == "roll-back":
        count = writes_of(name, "forwards")
        kernel.faults = (Fault("EIO", count),)
        return Way(kernel, journal, lambda: apply(kernel, journal, policy), first=count)
    if way == "undo":
        return Way(kernel, journal, lambda: undo(kernel.host(), journal))
    if way == "watcher":
        return Way(
            kernel, journal, lambda: revert_unconfirmed(kernel.host(), journal, "token", 5, tries=1)
        )
    finish = {"recover": None, "recover forwards": True, "recover backwards": False}[way]
    return Way(kernel, journal, lambda: recover(kernel.host(), journal, finish=finish))


def before_way(way: str) -> str:
    """What has to be there before: nothing, a change that ended (and waits to be confirmed), or one
    that was killed."""
    if way in ("undo", "watcher"):
        return {"undo": "changed", "watcher": "unconfirmed"}[way]
    return "killed" if way.startswith("recover") else "nothing"


@cache
def begun(name: str, state: str) -> tuple[FakeKernel, dict[str, bytes]]:
    """The kernel and the journal's files in that state: made once, copied for each case."""
    kernel, policy = kernel_of(name), parse_policy(HEAD + POLICIES.get(name, VFS))
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        if state in ("changed", "unconfirmed"):
            apply(kernel, journal, policy)
        if state == "unconfirmed":
            entry = {"transaction": 1, "pid": 1, "since": "7", "after": 0, "failed": None}
            journal.pending.replace("token", seal(entry))
        if state == "killed":
            die_in_the_middle(name, kernel, lambda: apply(kernel, journal, policy))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return kernel, {str(path.relative_to(folder)): path.read_bytes() for path in files}


def die_in_the_middle(name: str, kernel: FakeKernel, act: Callable[[], object]) -> None:
    middle = (writes_of(name, "forwards") + 1) // 2

    def kill(number: int, path: str, data: str) -> None:
        if number > middle:
            raise Killed

    kernel.before_write = kill
    with pytest.raises((Killed, Stuck)):
        act()
    kernel.before_write = None


def kernel_of(name: str) -> FakeKernel:
    kernel = furnished() if name in POLICIES else furnished_with_vfs()
    kernel.writes.clear()
    return kernel


@cache
def writes_of(name: str, way: str) -> int:
    with run_folder() as folder:
        case = ready(name, way, folder)
        before = len(case.kernel.writes)
        try:
            case.act()
        except KernelError:
            assert way == "roll-back"
        return len(case.kernel.writes) - before


def outcomes(name: str, way: str, limit: int) -> list[str]:
    total = writes_of(name, way)
    with run_folder() as folder:
        case = ready(name, way, folder)
        first, devices = case.first, devices_of(case.kernel)
        try:
            case.act()
        except KernelError:
            assert way == "roll-back"
        devices = tuple(dict.fromkeys((*devices, *devices_of(case.kernel))))
    cases = [
        (at, device, use)
        for at in range(first, total)
        for device in devices
        for use, alone in USES
        if alone in (None, device)
    ]
    return side_by_side(partial(_run_case, name, way), cases[:: max(1, len(cases) // limit)])


def _run_case(name: str, way: str, case: Case) -> str:
    at, device, use = case
    with run_folder() as folder:
        return _one(ready(name, way, folder), at, device, use, f"{name}, {way}")


def _one(case: Way, at: int, device: str, use: Use, label: str) -> str:
    kernel = case.kernel
    seen: list[object] = []

    def begin() -> None:
        if use(kernel, device) is not None:
            seen.append(condition(kernel, device))

    after_writes(kernel, at, begin)
    text = ""
    try:
        done = case.act()
        word = "done"
        if isinstance(done, tuple) and any(entry.result == "stuck" for entry in done):
            word, text = "stuck", " ".join(entry.detail or "" for entry in done)
        elif isinstance(done, tuple) and done:
            text = " ".join(entry.detail or "" for entry in done)
    except (Refused, KernelError, Stuck) as error:
        word, text = error.kind, error.message
    if not seen:
        return "not there"
    where = f"{label}: {device} after write {at} ({use.__name__}): {word}: {text}"
    assert condition(kernel, device) == seen[0], f"taken: {where}"
    if word == "refused":
        assert device in text, f"not named: {where}"
    if word == "stuck":
        left = [record for record in case.journal.history() if record.outcome is None]
        assert left and left[0].stuck, f"not declared: {where}"
    return word


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES]
)
def test_what_comes_into_use_is_never_taken(
    name: str, way: str, record_property: Callable[[str, object], None]
) -> None:
    wanted = bool(os.environ.get(PROOFS_WANTED))
    limit = 100_000 if wanted else 30
    tally = Counter(outcomes(name, way, limit))
    record_property("outcomes", dict(tally))
    print(f"{name:12}{way:20}" + "".join(f"{word} {count}   " for word, count in tally.items()))
    assert tally["done"] + tally["refused"] + tally["stuck"] + tally["kernel"] > 0
