"""A kernel in memory: a tree that reacts to writes as Linux does, and can be made to fail.

What it models is what `tests/cases.py` runs here and in guests, with the end states compared:
binding PCI drivers (drivers/base/bus.c, drivers/pci/pci-driver.c), SR-IOV (drivers/pci/iov.c,
pci-sysfs.c), mediated devices (drivers/vfio/mdev), modules. A write that it does not model is an
AssertionError, never a silent success.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fakes.net import vf_values
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import Address, parse_identity
from vfiotool.errors import KernelError, Stuck
from vfiotool.host.clock import Clock
from vfiotool.host.host import Host
from vfiotool.host.paths import BLOCK_CLAIM, ESWITCH, OBSERVED
from vfiotool.host.tree import MemoryTree
from vfiotool.netlink.codec import (
    NETLINK_GENERIC,
    Message,
    Request,
    iterate_attributes,
    parse_attributes,
)
from vfiotool.netlink.route import VfSettings

PCI = "/sys/bus/pci"
BOOT = "3b4e8c52-1111-4222-8333-0123456789ab"
RTM_SETLINK, IFLA_VFINFO_LIST = 19, 22
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\n?")

_HESITATION_S = 0.1

ERRNOS = ("EBUSY", "ENODEV", "EIO", "EINVAL", "EACCES", "ENOENT", "ENOMEM")
FAULTS = (*ERRNOS, "short", "silent", "partial", "hang")


@dataclass(frozen=True)
class Fault:
    """The write with this number (from 1) fails; with `always` each later write to its path too."""

    kind: str
    at: int
    always: bool = False


@dataclass
class Driver:
    """`ids` are `vendor:device` or `*`; `refuses` maps an address to the errno of its probe.

    With `foreign`, its probe refuses devices of other ids that an override sends to it; with
    `hesitant` it takes them, and lets go of them later, as nvme of Linux 6.1 does.
    """

    ids: frozenset[str] = frozenset()
    foreign: int = 0
    hesitant: bool = False
    refuses: dict[str, int] = field(default_factory=dict)
    sriov: bool = True


@dataclass
class Parent:
    """An mdev parent: each type takes so many units of the parent's `units`."""

    units: int
    types: dict[str, int]


class FakeClock(Clock):
    """Time that passes when somebody waits, and then at once; what is due happens on the way."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        end = self.now_s + seconds
        while self._due and min(at for at, _ in self._due) <= end:
            first = min(self._due, key=lambda entry: entry[0])
            self._due.remove(first)
            self.now_s = max(self.now_s, first[0])
            first[1]()
        self.now_s = end

    @property
    def is_due(self) -> bool:
        return bool(self._due)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self._due.append((self.now_s + seconds, act))


class FakeKernel(MemoryTree):
    """See the module. `host()` is what code under test takes."""

    def __init__(self) -> None:
        self._resolved: dict[tuple[str, bool], str] = {}
        self.clock = FakeClock()
        super().__init__({"/proc/sys/kernel/random/boot_id": f"{BOOT}\n".encode()}, {})
        self.drivers: dict[str, Driver] = {}
        self.modules: dict[str, dict[str, Driver]] = {}
        self.parents: dict[str, Parent] = {}
        self.vf_ids: dict[str, tuple[str, str]] = {}
        self.held: dict[str, int] = {}
        self.locked: set[str] = set()
        self.pending: list[tuple[str, Callable[[], None]]] = []
        self.faults: tuple[Fault, ...] = ()
        self.failing: dict[str, str] = {}
        self.writes: list[tuple[str, str]] = []
        self.before_write: Callable[[int, str, str], None] | None = None
        self.interfaces: dict[int, str] = {}
        self.vf_info: dict[tuple[str, int], VfSettings] = {}
        self._next_group = 100
        self._put(f"{PCI}/drivers_probe", b"")
        self._put("/sys/class/iommu/dmar0/x", b"")

    def host(self) -> Host:
        return Host(self, live=True, name="fake host", clock=self.clock)

    def copy(self) -> FakeKernel:
        """Another kernel in the same state. Nothing may be due or pending in this one."""
        assert not self.clock.is_due and not self.pending, "what is under way cannot be copied"
        made = copy(self)
        made.clock = FakeClock()
        made.clock.now_s = self.clock.now_s
        for name in ("_resolved", "files", "links", "modules", "parents", "vf_ids", "held"):
            setattr(made, name, dict(getattr(self, name)))
        for name in ("failing", "interfaces", "vf_info"):
            setattr(made, name, dict(getattr(self, name)))
        made.children = {path: set(names) for path, names in self.children.items()}
        made.drivers = {
            name: replace(driver, refuses=dict(driver.refuses))
            for name, driver in self.drivers.items()
        }
        made.locked, made.pending, made.writes = set(self.locked), [], list(self.writes)
        return made

    # What a host is made of

    def add_driver(self, name: str, ids: Iterable[str] = (), **kwargs: object) -> Driver:
        driver = Driver(frozenset(ids), **kwargs)  # type: ignore[arg-type]
        self.drivers[name] = driver
        for attribute in ("bind", "unbind", "new_id", "uevent"):
            self._put(f"{PCI}/drivers/{name}/{attribute}", b"")
        return driver

    def add_module(self, name: str, drivers: dict[str, Driver]) -> None:
        self.modules[name.replace("-", "_")] = drivers

    def add_function(
        self,
        address: str,
        ids: str,
        *,
        class_code: str = "ff0000",
        driver: str | None = None,
        group: int | None = None,
        total_vfs: int = 0,
        vf_ids: str | None = None,
        offset: int = 1,
        stride: int = 1,
        net: int | None = None,
    ) -> None:
        base = f"/sys/devices/pci0000:00/{address}"
        vendor, device = ids.split(":")
        self._put(f"{base}/vendor", f"0x{vendor}\n".encode())
        self._put(f"{base}/device", f"0x{device}\n".encode())
        self._put(f"{base}/driver_override", b"(null)\n")
        text = f"PCI_CLASS={class_code.upper()}\nPCI_ID={vendor.upper()}:{device.upper()}\n"
        text += f"PCI_SUBSYS_ID=1AF4:1100\nPCI_SLOT_NAME={address}\n"
        self._put(f"{base}/uevent", text.encode())
        self._put(f"{base}/resource", b"")
        self._link(f"{PCI}/devices/{address}", f"../../../devices/pci0000:00/{address}")
        if class_code.startswith("0108"):
            # The controller, which stands for a disk where there is none.
            self._put(f"{base}/nvme/nvme{address[-1]}/cntlid", b"0\n")
        if group is not None:
            self._join_group(base, address, group)
        if total_vfs:
            self._put(f"{base}/sriov_totalvfs", f"{total_vfs}\n".encode())
            self._put(f"{base}/sriov_numvfs", b"0\n")
            self._put(f"{base}/sriov_drivers_autoprobe", b"1\n")
            self._put(f"{base}/sriov_offset", f"{offset}\n".encode())
            self._put(f"{base}/sriov_stride", f"{stride}\n".encode())
            vf_vendor, vf_device = (vf_ids or ids).split(":")
            self._put(f"{base}/sriov_vf_device", f"{int(vf_device, 16):x}\n".encode())
            self.vf_ids[address] = (vf_vendor, vf_device)
        if net is not None:
            self._put(f"{base}/net/eth{net}/ifindex", f"{net}\n".encode())
            self._link(
                f"/sys/class/net/eth{net}", f"../../devices/pci0000:00/{address}/net/eth{net}"
            )
            self.interfaces[net] = address
        if driver is not None:
            self._attach(address, driver)

    def add_parent(self, name: str, units: int, types: dict[str, int]) -> None:
        """An mdev parent below /sys/devices/virtual, as the sample drivers make them."""
        self.parents[name] = Parent(units, types)
        base = f"/sys/devices/virtual/{name}/{name}"
        for kind in types:
            folder = f"{base}/mdev_supported_types/{kind}"
            self._put(f"{folder}/create", b"")
            self._put(f"{folder}/device_api", b"vfio-pci\n")
            self._put(f"{folder}/name", f"{kind}\n".encode())
            self._put(f"{folder}/available_instances", b"")
        self._link(f"/sys/class/mdev_bus/{name}", f"../../devices/virtual/{name}/{name}")
        self._count_instances(name)

    # The tree

    def resolve(self, path: str, *, follow_last: bool = True) -> str:
        """As a tree does; remembered until a link changes, for the sweeps' sake."""
        found = self._resolved.get((path, follow_last))
        if found is None:
            found = self._resolved[path, follow_last] = self._resolve(path, follow_last)
        return found

    def _resolve(self, path: str, follow_last: bool) -> str:
        """Siblings share the way to their folder."""
        folder, _, name = path.rpartition("/")
        if not folder or name in ("", ".", ".."):
            return super().resolve(path, follow_last=follow_last)
        place = f"{self.resolve(folder)}/{name}"
        if follow_last and place in self.links:
            return super().resolve(place)
        return place

    def _put(self, path: str, data: bytes) -> None:
        self.files[path] = data
        self._adopt(path)

    def _link(self, path: str, target: str) -> None:
        self.links[path] = target
        self._resolved.clear()
        self._adopt(path)

    def _remove(self, path: str) -> None:
        for name in list(self.children.get(path, ())):
            self._remove(f"{path}/{name}")
        self.children.pop(path, None)
        self.files.pop(path, None)
        if self.links.pop(path, None) is not None:
            self._resolved.clear()
        parent, _, name = path.rpartition("/")
        self.children.get(parent, set()).discard(name)

    def _join_group(self, base: str, name: str, group: int) -> None:
        up = "../" * base.count("/", 1)
        folder = f"/sys/kernel/iommu_groups/{group}"
        self._put(f"{folder}/type", b"DMA\n")
        self._put(f"{folder}/reserved_regions", b"0x00000000fee00000 0x00000000feefffff msi\n")
        self._link(f"{base}/iommu_group", f"{up}kernel/iommu_groups/{group}")
        self._link(f"{folder}/devices/{name}", f"../../../../{base.removeprefix('/sys/')}")

    def _leave_group(self, base: str, name: str) -> None:
        target = self.links.get(f"{base}/iommu_group")
        if target is not None:
            self._remove(f"/sys/kernel/iommu_groups/{target.rpartition('/')[2]}")

    def _real(self, address: str) -> str | None:
        link = self.links.get(f"{PCI}/devices/{address}")
        return None if link is None else "/sys/" + link.removeprefix("../../../")

    def read(self, path: str) -> bytes:
        if path.endswith(("/driver_override", "/sriov_numvfs")):
            address = path.split("/")[-2]
            if address in self.locked:
                raise Stuck(f"read {path}: no answer after 0 s", hint="vfiotool recover")
        if path.startswith(OBSERVED) and path not in self.files:
            # Nobody uses anything here, and all of that can be seen.
            if path.startswith(BLOCK_CLAIM):
                return b"free\n"
            if not path.startswith(ESWITCH):
                return b".\n"
        return super().read(path)

    # Writing

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        text = data.decode()
        self.writes.append((path, text))
        number = len(self.writes)
        if self.before_write is not None:
            self.before_write(number, path, text)
        kind = self._fault(number, path)
        if kind in ERRNOS:
            raise _error(getattr(errno, kind), path)
        if kind == "short":
            raise KernelError(f"write to {path}: the kernel took 0 of {len(data)} bytes")
        if kind == "silent":
            return
        self._react(path, text, partial=kind == "partial", hang=kind == "hang")

    def load_module(self, name: str, timeout_s: float) -> None:
        self.writes.append(("modprobe", name))
        number = len(self.writes)
        if self.before_write is not None:
            self.before_write(number, "modprobe", name)
        kind = self._fault(number, "modprobe")
        module = name.replace("-", "_")
        if kind == "silent":
            return
        if kind == "hang":
            raise Stuck(f"load module {name}: no answer after {timeout_s:g} s")
        if kind in (*ERRNOS, "short") or module not in self.modules:
            raise KernelError(f"load module {name}: modprobe: FATAL: Module {name} not found")
        for driver, made in self.modules[module].items():
            if driver not in self.drivers:
                self.add_driver(driver, made.ids)
                self.drivers[driver] = made

    def _fault(self, number: int, path: str) -> str | None:
        for fault in self.faults:
            if fault.at == number:
                if fault.always:
                    self.failing[path] = fault.kind
                return fault.kind
        return self.failing.get(path)

    def clear_faults(self) -> None:
        """The kernel works again, and whatever hung gets through."""
        self.faults = ()
        self.failing = {}
        self.held = {}
        pending, self.pending = self.pending, []
        for address, act in pending:
            self.locked.discard(address)
            act()

    def hold(
        self, address: str, pid: int = 4242, comm: str = "qemu", cdev: str | None = None
    ) -> None:
        """A process opens the VFIO node of a device: unbinding it blocks until `let_go`.

        The node is the group's, or with `cdev` the device's own, which goes before the wait
        (drivers/vfio/vfio_main.c, vfio_unregister_group_dev).
        """
        group = (self.links.get(f"{self._real(address)}/iommu_group") or "/0").rpartition("/")[2]
        self._put(f"/proc/{pid}/comm", f"{comm}\n".encode())
        self._link(f"/proc/{pid}/fd/5", f"/dev/vfio/{f'devices/{cdev}' if cdev else group}")
        if cdev:
            self._put(f"{self._real(address)}/vfio-dev/{cdev}/dev", b"511:0\n")
        self.held[address] = pid

    def let_go(self, address: str) -> None:
        self._remove(f"/proc/{self.held.pop(address)}")
        done = [entry for entry in self.pending if entry[0] == address]
        self.pending = [entry for entry in self.pending if entry[0] != address]
        for _, act in done:
            self.locked.discard(address)
            act()

    def _react(self, path: str, text: str, *, partial: bool, hang: bool) -> None:
        name = path.rpartition("/")[2]
        address = self._target(path, text)
        if address in self.locked:
            raise _stuck(path, text)

        def act() -> None:
            self._effect(path, name, address, text, partial)

        blocks = hang or (name in ("unbind", "remove") and address in self.held)
        if blocks:
            self.locked.add(address)
            self.pending.append((address, act))
            self._take_node_away(address)
            raise _stuck(path, text)
        act()

    def _take_node_away(self, address: str) -> None:
        folder = f"{self._real(address)}/vfio-dev"
        for cdev in self.listdir(folder) if self.exists(folder) else ():
            self._remove(f"{folder}/{cdev}")
            self._link(f"/proc/{self.held[address]}/fd/5", f"/dev/vfio/devices/{cdev} (deleted)")

    def _target(self, path: str, text: str) -> str:
        if path.startswith((f"{PCI}/drivers/", f"{PCI}/drivers_probe")):
            return text.strip()
        return path.split("/")[-2]

    def _effect(self, path: str, name: str, target: str, text: str, partial: bool) -> None:
        if not self.exists(path):
            raise _error(errno.ENOENT, path)
        if path == f"{PCI}/drivers_probe":
            if self._real(target) is None:
                raise _error(errno.ENODEV, path)
            self._probe(target)
        elif re.fullmatch(rf"{PCI}/drivers/[^/]+/(bind|unbind)", path):
            self._bind_or_unbind(path, name, target)
        elif name == "driver_override":
            if len(text) >= 4095:
                raise _error(errno.EINVAL, path)
            value = text.partition("\n")[0]
            self._put(f"{self._real(target)}/driver_override", f"{value or '(null)'}\n".encode())
        elif name == "sriov_numvfs":
            self._set_vfs(path, target, int(text), partial)
        elif name == "sriov_drivers_autoprobe":
            # kstrtobool takes more words than these, and no others are written.
            if text.strip() not in ("0", "1"):
                raise _error(errno.EINVAL, path)
            self._put(f"{self._real(target)}/{name}", f"{text.strip()}\n".encode())
        elif name == "create":
            self._create_mdev(path, text)
        elif name == "remove" and path.startswith("/sys/bus/mdev/devices/"):
            self._remove_mdev(path, target, text)
        elif name == "current_vgpu_type":
            # NVIDIA's driver takes a type's number, or 0 to take the vGPU away.
            if not text.strip().isdecimal():
                raise _error(errno.EINVAL, path)
            self._put(self.resolve(path), f"{text.strip()}\n".encode())
        elif path.startswith("/sys/bus/mdev/devices/") and name.startswith("attr_"):
            self._put(self.resolve(path), text.encode())
        else:
            raise AssertionError(f"the fake kernel does not model writing {text!r} to {path}")

    # Drivers

    def driver_of(self, address: str) -> str | None:
        link = self.links.get(f"{self._real(address)}/driver")
        return None if link is None else link.rpartition("/")[2]

    def override_of(self, address: str) -> str | None:
        text = self.files[f"{self._real(address)}/driver_override"].decode().strip()
        return None if text == "(null)" else text

    def _bind_or_unbind(self, path: str, name: str, address: str) -> None:
        driver = path.split("/")[-2]
        if self._real(address) is None:
            raise _error(errno.ENODEV, path)
        if name == "unbind":
            if self.driver_of(address) != driver:
                raise _error(errno.ENODEV, path)
            self._detach(address)
            return
        if not self._matches(address, driver):
            raise _error(errno.ENODEV, path)
        if self.driver_of(address) is not None:
            raise _error(errno.EBUSY, path)
        refused = self._refusal(address, driver)
        if refused:
            raise _error(refused, path)
        self._attach(address, driver)

    def _matches(self, address: str, driver: str) -> bool:
        override = self.override_of(address)
        if override is not None:
            return override == driver
        return self._has_id(address, driver)

    def _has_id(self, address: str, driver: str) -> bool:
        uevent = self.files[f"{self._real(address)}/uevent"].decode()
        found = parse_identity(address, uevent)
        return bool({f"{found.vendor}:{found.device}", "*"} & self.drivers[driver].ids)

    def _refusal(self, address: str, driver: str) -> int:
        base = self._real(address)
        if is_vfio_driver(driver):
            if f"{base}/iommu_group" not in self.links:
                return errno.EINVAL
            if self.files.get(f"{base}/sriov_numvfs", b"0\n") != b"0\n":
                return errno.EBUSY
        chosen = self.drivers[driver]
        takes = chosen.hesitant or self._has_id(address, driver)
        return chosen.refuses.get(address, 0 if takes else chosen.foreign)

    def _let_go_late(self, address: str, driver: str) -> None:
        if self.driver_of(address) == driver:
            self._detach(address)

    def _probe(self, address: str) -> None:
        if self.driver_of(address) is not None:
            return
        for driver in self.drivers:
            if self._matches(address, driver) and not self._refusal(address, driver):
                self._attach(address, driver)
                return

    def _attach(self, address: str, driver: str) -> None:
        base = self._real(address)
        self._link(f"{base}/driver", f"../../../bus/pci/drivers/{driver}")
        self._link(f"{PCI}/drivers/{driver}/{address}", f"../../../../devices/pci0000:00/{address}")
        uevent = self.files[f"{base}/uevent"]
        self._put(f"{base}/uevent", f"DRIVER={driver}\n".encode() + uevent)
        if self.drivers[driver].hesitant and not self._has_id(address, driver):
            self.clock.after(_HESITATION_S, lambda: self._let_go_late(address, driver))

    def _detach(self, address: str) -> None:
        base = self._real(address)
        driver = self.driver_of(address)
        numvfs = self.files.get(f"{base}/sriov_numvfs", b"0\n")
        assert numvfs == b"0\n", "unbinding a PF that has VFs is not modelled"
        self._remove(f"{base}/driver")
        self._remove(f"{PCI}/drivers/{driver}/{address}")
        uevent = self.files[f"{base}/uevent"]
        self._put(f"{base}/uevent", uevent.partition(b"\n")[2])

    # SR-IOV

    def _set_vfs(self, path: str, pf: str, count: int, partial: bool) -> None:
        base = self._real(pf)
        total = int(self.files[f"{base}/sriov_totalvfs"])
        now = int(self.files[f"{base}/sriov_numvfs"])
        if not 0 <= count <= total:
            raise _error(errno.ERANGE, path)
        if count == now:
            return
        driver = self.driver_of(pf)
        if driver is None or not self.drivers[driver].sriov:
            raise _error(errno.ENOENT, path)
        if count and now:
            raise _error(errno.EBUSY, path)
        if not count:
            for index in range(now):
                self._remove_vf(pf, index)
            self._put(f"{base}/sriov_numvfs", b"0\n")
            return
        made = count - 1 if partial else count
        for index in range(made):
            self._make_vf(pf, index)
        self._put(f"{base}/sriov_numvfs", f"{made}\n".encode())

    def vf_address(self, pf: str, index: int) -> str:
        base = self._real(pf)
        place = Address.parse(pf)
        offset = int(self.files[f"{base}/sriov_offset"])
        stride = int(self.files[f"{base}/sriov_stride"])
        routing = (place.bus << 8) + (place.device << 3) + place.function + offset + stride * index
        return str(Address(place.domain, routing >> 8, (routing >> 3) & 31, routing & 7))

    def _make_vf(self, pf: str, index: int) -> None:
        address = self.vf_address(pf, index)
        self.add_function(address, ":".join(self.vf_ids[pf]), group=self._next_group)
        self._next_group += 1
        self._link(f"{self._real(address)}/physfn", f"../{pf}")
        self._link(f"{self._real(pf)}/virtfn{index}", f"../{address}")
        if pf in self.interfaces.values():
            # igb gives each new VF a random address; here it tells when the VF was made.
            mac = f"52:00:00:{self._next_group:02x}:{index:02x}:00"
            self.vf_info[pf, index] = VfSettings(index, mac, 0, 0, True, False, 0, 0, 0)
        if self.vf_ids[pf][0] == "10de":
            self._put(f"{self._real(address)}/nvidia/current_vgpu_type", b"0\n")
        if self.files[f"{self._real(pf)}/sriov_drivers_autoprobe"] == b"1\n":
            self._probe(address)

    def _remove_vf(self, pf: str, index: int) -> None:
        address = self.vf_address(pf, index)
        if self.driver_of(address) is not None:
            self._detach(address)
        base = self._real(address) or ""
        self._leave_group(base, address)
        self._remove(base)
        self._remove(f"{PCI}/devices/{address}")
        self._remove(f"{self._real(pf)}/virtfn{index}")
        self.vf_info.pop((pf, index), None)

    # Network settings of VFs

    def vf_settings(self, ifindex: int) -> tuple[VfSettings, ...]:
        """What RTM_GETLINK tells of an interface's VFs (the reader's side of `answer_netlink`)."""
        pf = self.interfaces[ifindex]
        return tuple(self.vf_info[key] for key in sorted(self.vf_info) if key[0] == pf)

    answers_netlink = True

    def ask_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        return self.answer_netlink(request, timeout_s)

    def send_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        return self.answer_netlink(request, timeout_s)

    def answer_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        """RTM_SETLINK with a VF list (net/core/rtnetlink.c, do_setvfinfo); no generic family."""
        if request.protocol == NETLINK_GENERIC:
            raise KernelError(f"{request.what}: no such family", errno_name="ENOENT")
        assert request.type == RTM_SETLINK, "the fake kernel models RTM_SETLINK alone"
        self._admit(request, timeout_s, None, lambda: self._set_vf_info(request.payload))
        return []

    def _admit(
        self, request: Request, timeout_s: float, target: str | None, act: Callable[[], None]
    ) -> None:
        """Count a netlink request as a write and do it, unless a fault strikes."""
        self.writes.append(("netlink", request.what))
        number = len(self.writes)
        if self.before_write is not None:
            self.before_write(number, "netlink", request.what)
        kind = self._fault(number, "netlink")
        if kind in (*ERRNOS, "short"):
            raise KernelError(
                f"{request.what}: {kind}", errno_name=kind if kind in ERRNOS else None
            )
        if kind == "hang" and target is not None:
            self.pending.append((target, act))
            self.locked.add(target)
        if kind == "hang" or target in self.locked:
            raise Stuck(f"{request.what}: no answer after {timeout_s:g} s")
        if kind != "silent":
            act()

    def _set_vf_info(self, payload: bytes) -> None:
        (ifindex,) = struct.unpack_from("=i", payload, 4)
        pf = self.interfaces[ifindex]
        values = parse_attributes(payload[16:])
        for _, entry in iterate_attributes(values[IFLA_VFINFO_LIST]):
            for kind, data in iterate_attributes(entry):
                (index,) = struct.unpack_from("=I", data)
                if (pf, index) not in self.vf_info:
                    raise KernelError(f"VF {index} of {pf}: no such VF", errno_name="EINVAL")
                found = self.vf_info[pf, index]
                self.vf_info[pf, index] = replace(found, **vf_values(kind, data))

    # Mediated devices

    def _count_instances(self, parent: str) -> None:
        made = self.parents[parent]
        base = f"/sys/devices/virtual/{parent}/{parent}"
        used = 0
        for name in self.children[base]:
            target = self.links.get(f"{base}/{name}/mdev_type")
            used += made.types[target.rpartition("/")[2]] if target else 0
        for kind, units in made.types.items():
            left = f"{(made.units - used) // units}\n".encode()
            self._put(f"{base}/mdev_supported_types/{kind}/available_instances", left)

    def _create_mdev(self, path: str, text: str) -> None:
        real = self.resolve(path)
        folder = real.rpartition("/")[0]
        kind = folder.rpartition("/")[2]
        base = folder.partition("/mdev_supported_types")[0]
        parent = base.rpartition("/")[2]
        if not _UUID.fullmatch(text):
            raise _error(errno.EINVAL, path)
        uuid = text.strip().lower()
        if f"/sys/bus/mdev/devices/{uuid}" in self.links:
            raise _error(errno.EEXIST, path)
        if self.files[f"{folder}/available_instances"].strip() == b"0":
            raise _error(errno.ENOSPC, path)
        self._put(f"{base}/{uuid}/remove", b"")
        self._put(f"{base}/{uuid}/attr_level", b"0\n")
        self._link(f"{base}/{uuid}/mdev_type", f"../mdev_supported_types/{kind}")
        self._link(f"{base}/{uuid}/driver", f"../../../../bus/mdev/drivers/{parent}")
        self._link(
            f"/sys/bus/mdev/devices/{uuid}", f"../../../devices/virtual/{parent}/{parent}/{uuid}"
        )
        self._join_group(f"{base}/{uuid}", uuid, self._next_group)
        self._next_group += 1
        self._count_instances(parent)

    def _remove_mdev(self, path: str, uuid: str, text: str) -> None:
        if not text.strip().isdecimal():
            raise _error(errno.EINVAL, path)
        if text.strip() == "0":
            return
        real = self.resolve(f"/sys/bus/mdev/devices/{uuid}")
        self._leave_group(real, uuid)
        self._remove(real)
        self._remove(f"/sys/bus/mdev/devices/{uuid}")
        self._count_instances(real.split("/")[-2])

    # What two hosts are compared by

    def state(self) -> dict[Any, object]:
        """Everything that a change can change, but group numbers: those of VFs are not stable."""
        levels = {path: data for path, data in self.files.items() if path.endswith("/attr_level")}
        return end_state(self.host()) | self.vf_info | levels


def end_state(host: Host) -> dict[Any, object]:
    """The facts of a host, fake or real, that changes change; group numbers are left out."""
    state: dict[Any, object] = {}
    for address in host.listdir(f"{PCI}/devices"):
        base = f"{PCI}/devices/{address}"
        names = ("driver_override", "sriov_numvfs", "sriov_drivers_autoprobe")
        values = host.read_guarded([f"{base}/{name}" for name in names])
        state[address] = (
            host.linkname(f"{base}/driver"),
            *(values[f"{base}/{name}"] for name in names),
        )
    for uuid in host.listdir("/sys/bus/mdev/devices"):
        base = f"/sys/bus/mdev/devices/{uuid}"
        place = host.realpath(base) or ""
        kind = host.linkname(f"{base}/mdev_type")
        state[uuid] = (place.split("/")[-2], kind)
    return state


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def _stuck(path: str, text: str) -> Stuck:
    return Stuck(f"write {text.strip()!r} to {path}: no answer after 0 s", hint="vfiotool recover")
