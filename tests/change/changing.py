"""What tests of `vfiotool.change` share: a furnished fake host, and the operations on it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from tests.fakes.kernel import Driver, FakeKernel
from vfiotool.change.apply import Outcome, change
from vfiotool.change.journal import Journal
from vfiotool.change.plans.bind import plan_bind, plan_release
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.plans.mdev import plan_mdev_create, plan_mdev_remove
from vfiotool.change.plans.sriov import plan_vf_count
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.devices.mdev import read_mdev_types, read_mdevs
from vfiotool.host.host import Host

EDU = "0000:00:01.0"
TESTDEV = "0000:00:02.0"
NVME = "0000:01:00.0"
NIC = "0000:02:00.0"
STUBBORN = "0000:03:00.0"
BRIDGE, BEHIND, BESIDE = "0000:04:00.0", "0000:05:01.0", "0000:05:02.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def furnished() -> FakeKernel:
    """The lab's machine `full`, as far as changes go, with two mdev parents."""
    return _furnished().copy()


@cache
def _furnished() -> FakeKernel:
    kernel = FakeKernel()
    kernel.add_driver("nvme", ["1b36:0010"])
    kernel.add_driver("igb", ["8086:10c9"])
    kernel.add_driver("igbvf", ["8086:10ca"])
    kernel.add_driver("e1000", ["8086:100e"], refuses={NVME: errno.EIO, EDU: errno.EIO})
    kernel.add_driver("vfio-pci", refuses={STUBBORN: errno.EINVAL})
    kernel.add_driver("pcieport", ["1b36:000c"])
    kernel.add_module("mlx5_vfio_pci", {"mlx5_vfio_pci": Driver()})
    kernel.add_function(EDU, "1234:11e8", group=1)
    kernel.add_function(TESTDEV, "1b36:0005", group=2)
    kernel.add_function(
        NVME,
        "1b36:0010",
        class_code="010802",
        driver="nvme",
        group=10,
        total_vfs=4,
    )
    kernel.add_function(
        NIC,
        "8086:10c9",
        class_code="020000",
        driver="igb",
        group=11,
        total_vfs=7,
        vf_ids="8086:10ca",
        offset=128,
        stride=2,
        net=3,
    )
    kernel.add_function(STUBBORN, "1b36:0010", class_code="010802", driver="nvme", group=12)
    kernel.add_function(BRIDGE, "1b36:000e", class_code="060400", group=13)
    kernel.add_function(BEHIND, "1234:11e8", group=13)
    kernel.add_function(BESIDE, "8086:100e", class_code="020000", driver="e1000", group=13, net=4)
    kernel.add_parent("mtty", 24, {"mtty-1": 1, "mtty-2": 2})
    kernel.add_parent("mdpy", 4, {"mdpy-vga": 1, "mdpy-hd": 1})
    return kernel


@contextmanager
def run_folder() -> Iterator[str]:
    """A journal's folder in memory: syncing to a disk would make thousands of cases slow."""
    path = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        yield f"{path}/vfiotool"
    finally:
        shutil.rmtree(path)


Make = Callable[[Host, Journal | None], tuple[Step, ...]]


def binding(*addresses: str, driver: str | None = None, whole_group: bool = False) -> Make:
    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        facts = read_facts(
            host,
            addresses,
            journal,
            whole_groups=whole_group,
            variants_wanted=driver is None,
        )
        return plan_bind(facts, addresses, driver, whole_group=whole_group)

    return make


def releasing(*addresses: str) -> Make:
    return lambda host, journal: plan_release(
        read_facts(host, addresses, journal, variants_wanted=False), addresses
    )


def counting(pf: str, count: int, autoprobe: bool | None = None) -> Make:
    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        facts = read_facts(host, [pf], journal, variants_wanted=False)
        settings = read_settings(host, pf) or ()
        return plan_vf_count(facts, pf, count, autoprobe=autoprobe, settings=settings)

    return make


def creating(parent: str, kind: str, uuid: str = UUID) -> Make:
    return lambda host, _: plan_mdev_create(
        read_mdev_types(host), read_mdevs(host), parent, kind, uuid
    )


def removing(uuid: str = UUID) -> Make:
    return lambda host, _: plan_mdev_remove(read_mdevs(host), uuid)


def do(host: Host, journal: Journal, make: Make, timeout_s: float = 5.0) -> Outcome:
    """Plan and run, as the commands do, but without the guard."""
    return change(host, journal, "a change", lambda: make(host, journal), timeout_s=timeout_s)
