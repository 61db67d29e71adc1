"""The sweep's second dimension on real kernels: a sample of what tests/change/test_uses.py tries
whole on the fake kernel.

For each policy and each way in which steps run, a device of the policy comes into use between two
writes, really: a file system of it is mounted, the host swaps to it, an interface gets an address,
a program opens a node or a window of registers, a virtual machine's process opens it over VFIO.
Whatever comes next, the use goes on working and the device stays as it was when its use began; a
refusal names it, and what could not be rolled back for its sake is declared stuck.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.change.changing import BEHIND, BESIDE, NIC, NVME, UUID, run_folder
from tests.change.test_faults import DISK, DISK_VFS, GROUP, HEAD, START_WITH_VFS, VFS
from tests.change.test_faults import POLICIES as FAKE_POLICIES
from tests.change.test_uses import WAYS as FAKE_WAYS
from tests.fakes.kernel import end_state
from tests.lab.commands import driver_of, modprobe, restore
from tests.lab.test_crash import KillingTree, in_child
from vfiotool.boot.run import run_policy as boot
from vfiotool.change.apply import change
from vfiotool.change.confirm import revert_unconfirmed
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.change.undo import undo
from vfiotool.errors import KernelError, Refused, Stuck
from vfiotool.host.host import Host
from vfiotool.host.tree import OsTree
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy
from vfiotool.vfio import Device

MACHINE = "full"
# About an hour: once is enough for a guard that asks every kernel the same.
KERNELS = ("6.12",)
PROOF = "200 changes, each with a use of its own"
LIMIT_S = 7200.0

PCI = "/sys/bus/pci/devices"
MDEVS = "".join(
    f'[[mdev]]\nparent = "mtty"\ntype = "mtty-1"\nuuid = "{UUID[:-1]}{digit}"\n'
    for digit in range(3)
)
# Those of the fault sweep; of the two that need what only the fake has (attributes of an mdev, a
# driver of NVMe's variants) the likes that this machine has.
POLICIES = {
    **FAKE_POLICIES,
    "mdevs": MDEVS,
    "variant": f'{DISK}driver = "none"\n',
    "mixed": DISK + GROUP + VFS + MDEVS,
    START_WITH_VFS: VFS,
}
assert DISK_VFS in POLICIES.values()
# Left to itself `recover` goes one of the two ways that are here by name.
WAYS = tuple(way for way in FAKE_WAYS if way != "recover")
# Cases wanted of each policy and way where the sample is taken in full: most of those that are soon
# done. Where a way has few writes, fewer uses can begin.
CASES = {
    "disk": 7,
    "variant": 7,
    "group": 8,
    "mdevs": 6,
    "disk-vfs": 4,
    "vfs": 3,
    "mixed": 2,
    START_WITH_VFS: 2,
}
FULL = "6.12"
AT_LEAST = 200
# What an earlier write left to the kernel's threads, such as a disk's node, is waited for.
SETTLE_S = 5.0
POINT = "/run/sweep-mounted"

TALLY: Counter[tuple[str, str]] = Counter()
USES: Counter[str] = Counter()


@dataclass
class Use:
    """A use that has begun: `works` fails if it was cut off, `stack` ends it."""

    works: Callable[[], object]
    stack: ExitStack = field(default_factory=ExitStack)


class WatchedTree(OsTree):
    """Calls `act` after each write from the `at`th on, before the next is asked for; fails one."""

    def __init__(self, at: int, act: Callable[[int], None], fail_at: int = 0) -> None:
        super().__init__()
        self.at, self.act, self.fail_at, self.count = at, act, fail_at, 0

    def counted(self, path: str, write: Callable[[], Any]) -> Any:
        try:
            if self.count + 1 == self.fail_at:
                raise OSError(errno.EIO, "failed by the test", path)
            return write()
        finally:
            self.count += 1
            if self.count >= self.at:
                self.act(self.count)

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        self.counted(path, lambda: super(WatchedTree, self).write_attribute(path, data, timeout_s))

    def load_module(self, name: str, timeout_s: float) -> None:
        self.counted(name, lambda: super(WatchedTree, self).load_module(name, timeout_s))

    def ask_netlink(self, request: Any, timeout_s: float) -> Any:
        return super().send_netlink(request, timeout_s)

    def send_netlink(self, request: Any, timeout_s: float) -> Any:
        send = super().send_netlink
        return self.counted(request.what, lambda: send(request, timeout_s))


def host_on(tree: OsTree) -> Host:
    return Host(tree, live=True, name="this host")


# --- uses


def settled(found: Callable[[], Any]) -> Any:
    """What `found` finds, waiting while it is nothing; None in the end."""
    deadline = time.monotonic() + SETTLE_S
    while not (result := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def disk_of(device: str) -> str | None:
    """The node of the NVMe disk that the host's driver has."""
    for path in Path(f"{PCI}/{device}").glob("nvme/nvme*/nvme*"):
        # With multipathing the controller shows a hidden path (nvme0c0n1) to the disk.
        if name := re.fullmatch(r"(nvme\d+)(c\d+)?(n\d+)", path.name):
            node = f"/dev/{name[1]}{name[3]}"
            if os.path.exists(node) and Path(f"/sys/class/block/{node[5:]}/size").exists():
                return node
    return None


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


def node_in_use(device: str) -> str | None:
    if driver_of(device) != "nvme":
        return None
    node: str | None = settled(lambda: disk_of(device))
    return node


def or_made(use: tuple[str, ...], make: tuple[str, ...]) -> None:
    """Use what is on the disk from an earlier case; make it first where it is something else."""
    if subprocess.run(use, capture_output=True, check=False).returncode:
        run(*make)
        run(*use)


def mount(device: str) -> Use | None:
    if (node := node_in_use(device)) is None:
        return None
    os.makedirs(POINT, exist_ok=True)
    or_made(("mount", "-t", "ext4", node, POINT), ("mke2fs", "-qF", "-t", "ext4", node))

    def works() -> None:
        with open(f"{POINT}/written", "w") as file:
            file.write("still there")
            file.flush()
            os.fsync(file.fileno())

    use = Use(works)
    use.stack.callback(run, "umount", POINT)
    return use


def swap(device: str) -> Use | None:
    if (node := node_in_use(device)) is None:
        return None
    or_made(("swapon", node), ("mkswap", node))

    def works() -> None:
        assert node in Path("/proc/swaps").read_text()
        with open(node, "rb", buffering=0) as file:
            assert len(os.pread(file.fileno(), 4096, 0)) == 4096

    use = Use(works)
    use.stack.callback(run, "swapoff", node)
    return use


def give_address(device: str) -> Use | None:
    if driver_of(device) not in ("igb", "igbvf"):
        return None
    folder = Path(f"{PCI}/{device}/net")
    names = settled(lambda: os.listdir(folder) if folder.is_dir() else [])
    if not names:
        return None
    run("ip", "address", "add", "192.0.2.7/24", "dev", names[0])

    def works() -> None:
        shown = ("ip", "-br", "address", "show", "dev", names[0])
        assert "192.0.2.7" in subprocess.run(shown, capture_output=True, text=True).stdout

    use = Use(works)
    use.stack.callback(run, "ip", "address", "del", "192.0.2.7/24", "dev", names[0])
    return use


def held_by_another(take: Callable[[], Callable[[], object]]) -> Use | None:
    """A process that takes something and reads of it when asked; None if it could not."""
    question, asked = os.pipe()
    answers, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # Nothing of the change's: neither its locks nor its writer.
            kept = sorted((question, answer))
            os.closerange(3, kept[0])
            os.closerange(kept[0] + 1, kept[1])
            os.closerange(kept[1] + 1, 1 << 12)
            read = take()
            os.write(answer, b"y")
            while os.read(question, 1):
                read()
                os.write(answer, b"y")
        finally:
            os._exit(0)
    os.close(question)
    os.close(answer)
    use = Use(lambda: None)

    def end() -> None:
        os.close(asked)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(answers)

    use.stack.callback(end)
    if os.read(answers, 1) != b"y":
        use.stack.close()
        return None

    def works() -> None:
        os.write(asked, b"?")
        assert os.read(answers, 1) == b"y", "the holder cannot read any more"

    use.works = works
    return use


def open_disk(device: str) -> Use | None:
    if (node := node_in_use(device)) is None:
        return None

    def take() -> Callable[[], object]:
        file = os.open(node, os.O_RDONLY)
        return lambda: os.pread(file, 4096, 0)

    return held_by_another(take)


def open_registers(device: str) -> Use | None:
    path = Path(f"{PCI}/{device}/resource0")
    if not path.exists() or driver_of(device) is not None:
        return None

    def take() -> Callable[[], object]:
        file = os.open(path, os.O_RDWR)
        return lambda: os.fstat(file)

    return held_by_another(take)


def give_to_vm(device: str) -> Use | None:
    """What QEMU does with it: opens it over VFIO."""
    if ":" in device and driver_of(device) != "vfio-pci":
        return None
    if not os.path.exists(place(device)):
        return None

    def take() -> Callable[[], object]:
        opened = Device.open(device)
        return lambda: opened.config.read(0, 4)

    return held_by_another(take)


BEGIN = (mount, give_address, give_to_vm, open_registers, open_disk, swap)


# --- the ways


def place(device: str) -> str:
    return f"{PCI}/{device}" if ":" in device else f"/sys/bus/mdev/devices/{device}"


def devices_of(name: str) -> tuple[str, ...]:
    """Whatever the policy is about, what shares a group with it, and VFs that are there now."""
    text = POLICIES[name]
    vfs = sorted(
        os.path.realpath(path).rpartition("/")[2]
        for pf in (NIC, NVME)
        if pf in text
        for path in Path(f"{PCI}/{pf}").glob("virtfn*")
    )
    named = [pf for pf in (NVME, NIC) if pf in text]
    group = [BEHIND, BESIDE] if BEHIND in text else []
    uuids = re.findall(r'uuid = "([^"]+)"', text)
    return (*vfs, *named, *group, *uuids)


def apply(host: Host, folder: str, name: str) -> None:
    journal, policy = Journal(host, folder), parse_policy(HEAD + POLICIES[name])

    def plan() -> tuple[Step, ...]:
        return plan_policy(policy, read_policy_facts(host, policy, journal)).steps

    change(host, journal, "apply", plan)


def prepare(name: str) -> None:
    """What stands before the policy is applied."""
    if name != START_WITH_VFS:
        return
    text = HEAD + VFS.replace("vfs = 3", "vfs = 5")
    host = Host.local()
    with run_folder() as folder:
        policy, journal = parse_policy(text), Journal(host, folder)
        change(
            host,
            journal,
            "apply",
            lambda: plan_policy(policy, read_policy_facts(host, policy, journal)).steps,
        )


def begin_way(name: str, way: str, folder: str) -> Callable[[OsTree], object]:
    """Do what comes before this way; what runs it on a tree."""
    if way in ("forwards", "roll-back"):
        return lambda tree: apply(host_on(tree), folder, name)
    if way == "boot":
        policy = parse_policy(HEAD + POLICIES[name])
        return lambda tree: boot(host_on(tree), policy, run_folder=folder)
    if way in ("undo", "watcher"):
        apply(Host.local(), folder, name)
        if way == "undo":
            return lambda tree: undo(host_on(tree), Journal(host_on(tree), folder))
        entry = {"transaction": 1, "pid": 1, "since": "7", "after": 0, "failed": None}
        Journal(Host.local(), folder).pending.replace("token", seal(entry))
        return lambda tree: revert_unconfirmed(
            host_on(tree), Journal(host_on(tree), folder), "token", 5, tries=1
        )
    middle = (writes_of(name, "forwards") + 1) // 2
    killing = KillingTree(middle, "after")
    assert in_child(lambda host: apply(host, folder, name), killing) == signal.SIGKILL
    finish = way == "recover forwards"
    return lambda tree: recover(host_on(tree), Journal(host_on(tree), folder), finish=finish)


@cache
def writes_of(name: str, way: str) -> int:
    """How many writes that way has where nobody uses anything, or no more than it has."""
    if way == "boot":
        return writes_of(name, "forwards")
    if way == "watcher":
        return writes_of(name, "undo")
    if way == "roll-back":
        return writes_of(name, "forwards") + writes_of(name, "undo") // 2
    if way.startswith("recover"):
        return writes_of(name, "forwards") // 2
    with ground(name) as folder:
        act = begin_way(name, way, folder)
        tree = WatchedTree(0, lambda _: None)
        act(tree)
        return tree.count


def failing(name: str, way: str) -> int:
    return writes_of(name, "forwards") if way == "roll-back" else 0


@cache
def untouched() -> dict[Any, object]:
    return end_state(Host.local())


@contextlib.contextmanager
def ground(name: str) -> Iterator[str]:
    """The state before the policy, and a journal's folder; afterwards the guest as it was."""
    before = untouched()
    try:
        prepare(name)
        with run_folder() as folder:
            yield folder
    finally:
        restore(Host.local())
    if not settled(lambda: end_state(Host.local()) == before):
        now = end_state(Host.local())
        other = {key for key in {*before, *now} if before.get(key) != now.get(key)}
        pytest.fail(f"left behind: {[(key, before.get(key), now.get(key)) for key in other]}")


def condition(device: str) -> object:
    """What whoever uses the device would notice: that it is there, its driver, a VF's settings."""
    settings: object = None
    pf = Path(place(device), "physfn")
    if pf.exists() and driver_of(device) in ("igbvf", "vfio-pci"):
        owner = os.path.realpath(pf).rpartition("/")[2]
        known = read_settings(Host.local(), owner) or ()
        links = Path(f"{PCI}/{owner}").glob("virtfn*")
        index = {os.path.realpath(link).rpartition("/")[2]: int(link.name[6:]) for link in links}
        settings = known[index[device]] if index[device] < len(known) else None
    path = os.path.realpath(place(device))
    return (
        path if os.path.exists(path) else None,
        driver_of(device) if ":" in device else None,
        settings,
    )


def names_of(device: str, kind: str) -> tuple[str, ...]:
    """How a refusal may name a use: by the device or, where the whole group is in use through its
    node, by that node at whichever of its members the next step is about."""
    group = Path(place(device), "iommu_group")
    if kind != give_to_vm.__name__ or not group.exists():
        return (device,)
    return (device, f"/dev/vfio/{os.path.basename(os.path.realpath(group))} ")


# --- one case


@dataclass
class Case:
    """A use that begins after write `at` of a way or, where none is possible there that was not
    tried before, after the next; and what comes of it."""

    name: str
    way: str
    at: int
    turn: int
    avoid: set[tuple[int, str, str]]
    began: tuple[str, str, Use, object] | None = None

    def begin(self, at: int) -> None:
        """The first use that is possible now, looked for from another one each turn."""
        if self.began is not None:
            return
        pairs = [(device, use) for use in BEGIN for device in devices_of(self.name)]
        turned = (self.turn * 7 + at * 5) % len(pairs)
        for device, begin in (*pairs[turned:], *pairs[:turned]):
            if (at, device, begin.__name__) in self.avoid:
                continue
            if use := begin(device):
                self.avoid.add((at, device, begin.__name__))
                self.began = device, begin.__name__, use, condition(device)
                self.at = at
                return

    def run(self) -> str:
        """The outcome in a word. Fails unless all promises hold."""
        with ground(self.name) as folder:
            act = begin_way(self.name, self.way, folder)
            tree = WatchedTree(self.at, self.begin, failing(self.name, self.way))
            if self.at == 0:
                self.begin(0)
            word, text = ended(lambda: act(tree))
            if self.began is None:
                return "nobody"
            device, kind, use, seen = self.began
            label = f"{self.name}, {self.way}: {device} after write {self.at} ({kind})"
            with use.stack:
                assert condition(device) == seen, f"taken: {label}: {word}: {text}"
                use.works()
                if word == "refused":
                    named = any(name in text for name in names_of(device, kind))
                    assert named, f"not named: {label}: {text}"
                if word == "stuck":
                    left = [one for one in history(folder) if one.outcome is None]
                    assert left and left[0].stuck, f"not declared: {label}"
            USES[kind] += 1
            print(f"\n  {label}: {word}", end="")
            return word


def history(folder: str) -> list[Any]:
    return Journal(Host.local(), folder).history()


def ended(act: Callable[[], object]) -> tuple[str, str]:
    try:
        done = act()
    except (Refused, KernelError, Stuck) as error:
        return error.kind, error.message
    if isinstance(done, tuple) and any(entry.result == "stuck" for entry in done):
        return "stuck", " ".join(entry.detail or "" for entry in done)
    return "done", ""


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    modprobe("vfio-pci", "igbvf", "ext4")
    yield
    shutil.rmtree(POINT, ignore_errors=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", POLICIES)
def test_what_comes_into_use_is_never_taken(
    name: str, way: str, lab_kernel: str, record_property: Callable[[str, object], None]
) -> None:
    if "mtty" in POLICIES[name] and not os.path.exists("/sys/class/mdev_bus/mtty"):
        pytest.skip("this guest has no sample mdev parents")
    if NIC in POLICIES[name] and not os.path.exists("/sys/bus/pci/drivers/igbvf"):
        pytest.skip("this kernel has no igbvf")
    total, first = writes_of(name, way), failing(name, way)
    wanted, found = CASES[name] if lab_kernel == FULL else 1, Counter[str]()
    avoid: set[tuple[int, str, str]] = set()
    # Where there are few cases for each, they begin at another write for each policy and way.
    span, shift = max(1, total - first), list(POLICIES).index(name) + WAYS.index(way)
    for turn in range(2 * wanted):
        at = first + (turn * span // wanted + shift) % span
        word = Case(name, way, at, turn, avoid).run()
        found[word] += 1
        if sum(found.values()) - found["nobody"] == wanted:
            break
        if word == "nobody":
            # From here on every use has been tried.
            span = at - first
            if span == 0:
                break
    for word, count in found.items():
        TALLY[way, word] += count
    record_property("outcomes", dict(found))
    print(f"\n{name:12}{way:20}" + "".join(f"{word} {count}   " for word, count in found.items()))
    assert sum(found.values()) > found["nobody"]


def test_the_sample_is_large_enough(
    lab_kernel: str, record_property: Callable[[str, object], None]
) -> None:
    for way in WAYS:
        record_property(way, {word: n for (of, word), n in TALLY.items() if of == way})
    record_property("uses", dict(USES))
    real = sum(USES.values())
    record_property("cases", real)
    assert real >= (AT_LEAST if lab_kernel == FULL else len(WAYS)), f"{real} cases"
    assert set(USES) == {use.__name__ for use in BEGIN}
