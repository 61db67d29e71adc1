"""A device opened through VFIO: what it is, its regions, interrupts and memory, its end.

`Device.open` gives a context manager that leaves the device quiet, whatever happened: what the
driver registered with `on_close` (quiesce), bus mastering off, interrupts off, mappings gone,
DMA unmapped, then the device, its group and its container closed, in this order.
Source: Documentation/driver-api/vfio.rst, <linux/vfio.h>; PCI Local Bus Specification 3.0, 6.2.2.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.native import library as native
from vfiotool.vfio.backend import Backend, open_space
from vfiotool.vfio.caps import CONFIG_REGION, IRQ_FLAGS, IrqInfo, RegionInfo, names
from vfiotool.vfio.dma import Dma, dma_of
from vfiotool.vfio.irq import Interrupts
from vfiotool.vfio.opened import OpenDevice
from vfiotool.vfio.reach import COMMAND, COMMAND_MASTER, COMMAND_MEMORY
from vfiotool.vfio.region import Config, Mapping, Region
from vfiotool.vfio.space import AddressSpace
from vfiotool.vfio.target import find
from vfiotool.vfio.trace import Trace

# What the fixed regions of a PCI device are called (VFIO_PCI_*_REGION_INDEX).
REGION_NAMES = {**{f"bar{n}": n for n in range(6)}, "rom": 6, "config": CONFIG_REGION, "vga": 8}
_CONFIG_IDS = 0x00
_CONFIG_CLASS = 0x08
# Device-specific regions come after the nine fixed ones; no driver has near as many.
_REGION_LIMIT = 256
_IRQ_LIMIT = 64

FEATURE_GET = 1 << 16
FEATURE_SET = 1 << 17
FEATURE_PROBE = 1 << 18
FEATURES = {
    0: "vf-token",
    1: "migration",
    2: "migration-state",
    3: "low-power-entry",
    4: "low-power-entry-with-wakeup",
    5: "low-power-exit",
    6: "dma-logging-start",
    7: "dma-logging-stop",
    8: "dma-logging-report",
    9: "migration-data-size",
    10: "bus-master",
    11: "dma-buf",
}
_LOW_POWER_ENTRY, _LOW_POWER_ENTRY_WITH_WAKEUP, _LOW_POWER_EXIT = 3, 4, 5
# Whether the device may sleep after it was set. A device that a signal woke may sleep again.
_LOW_POWER = {_LOW_POWER_ENTRY: True, _LOW_POWER_ENTRY_WITH_WAKEUP: True, _LOW_POWER_EXIT: False}


@dataclass(frozen=True, slots=True)
class Dependent:
    """A function that a hot reset takes along: `address`, and its IOMMU group (type1) or the id
    of its device in this space (iommufd: 0 ours without being open, -1 somebody else's)."""

    address: str
    owner: int


class Device(OpenDevice):
    """An open device. Make one with `Device.open`; all errors are VfiotoolError."""

    def __init__(
        self,
        space: AddressSpace,
        name: str,
        *,
        owns_space: bool = False,
        trace: Trace | None = None,
        vf_token: str | None = None,
    ) -> None:
        self.space = space
        self._owns_space = owns_space
        self._quiesce: list[Callable[[], object]] = []
        self._close_lock = threading.RLock()
        self._closing = False
        self._regions: dict[int, Region] = {}
        self.attachment = space.attach(find(name, space.host), vf_token)
        self.target = self.attachment.target
        if trace is not None:
            trace.device = self.target.name
        try:
            found = self.attachment
            super().__init__(self.target.name, found.handle, trace, found.calls)
            self._learn()
        except BaseException:
            space.detach(self.attachment)
            raise
        space.devices.append(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"open over {self.backend}"
        reason = None if self.closed else self.reach.reason
        return f"<Device {self.name}, {state}{f'; {reason}' if reason else ''}>"

    @classmethod
    def open(
        cls,
        name: str,
        *,
        backend: Backend = "auto",
        space: AddressSpace | None = None,
        host: Host | None = None,
        trace: Trace | None = None,
        vf_token: str | None = None,
    ) -> Device:
        """Open the device called `name` (PCI address, mdev UUID, or `vfio-user:` and the path of a
        socket that a device is served on), in `space` if one is given,
        otherwise in a space of its own over `backend` ("auto", "iommufd", "type1", "noiommu").
        `vf_token` is the UUID that the user-space driver of its PF has set, where there is one;
        only a group takes it, so "auto" is type1 then.

        Raises NotFound, Refused (exit 4: not on a VFIO driver, or its group is not viable; the
        hint is the command), NotPermitted, Unsupported, and KernelError with EBUSY when it is
        open elsewhere.
        """
        if space is not None:
            return cls(space, name, trace=trace, vf_token=vf_token)
        host = host or Host.local()
        if backend == "auto" and vf_token is not None:
            backend = "type1"
        own = open_space(find(name, host), backend, host)
        try:
            return cls(own, name, owns_space=True, trace=trace, vf_token=vf_token)
        except BaseException:
            own.close()
            raise

    def _learn(self) -> None:
        regions = [self.ask_region(i) for i in range(min(self.info.num_regions, _REGION_LIMIT))]
        irqs: list[IrqInfo | None] = []
        for index in range(min(self.info.num_irqs, _IRQ_LIMIT)):
            found = self.calls.irq_info(index)
            irqs.append(
                None if found is None else IrqInfo(index, found[1], names(found[0], IRQ_FLAGS))
            )
        self._infos = tuple(regions)
        self._irqs = Interrupts(self, irqs)
        # Attaching may have narrowed what can be mapped.
        self._dma = dma_of(self.space)
        self._dma.trace = self._dma.trace or self.trace
        self._dma.refresh()
        self.reach.refresh()

    @property
    def dma(self) -> Dma:
        """The memory that it and the other devices of its space share: `alloc`, `map`."""
        return self._dma

    @property
    def irqs(self) -> Interrupts:
        """What it can signal: `msix`, `msi`, `intx`, `error`, `request`."""
        return self._irqs

    @property
    def regions(self) -> tuple[RegionInfo | None, ...]:
        """What the kernel tells of each region, by index; None where there is none."""
        return self._infos

    @property
    def backend(self) -> str:
        """ "type1", "iommufd", "noiommu" or "vfio-user"."""
        return self.space.name

    @property
    def descriptor(self) -> int:
        """The device's file, for looking only: another thread may close it (`use` keeps it open).
        Raises UsageError once it is closed, and in a child process."""
        self.refuse_closed()
        return self.handle.number

    @property
    def mappings(self) -> list[Mapping]:
        """The mappings of its regions that were not closed."""
        return [window for window in self.reach.windows if isinstance(window, Mapping)]

    def _identity(self, offset: int, width: int) -> int:
        return self.config.read(offset, width)

    @property
    def vendor(self) -> int:
        """The vendor's id (PCI Local Bus 3.0, 6.2.1). Raises Unsupported for what is not PCI."""
        return self._identity(_CONFIG_IDS, 2)

    @property
    def device(self) -> int:
        """The device's id, as the vendor gave it; as `vendor`."""
        return self._identity(_CONFIG_IDS + 2, 2)

    @property
    def class_code(self) -> int:
        """Class, subclass and interface in 24 bits (0x010802 is an NVMe controller); as
        `vendor`."""
        return self._identity(_CONFIG_CLASS, 4) >> 8

    def region(self, index: int | str) -> Region:
        """The region `index`: of a PCI device 0 to 5 are the BARs, 6 the ROM, 7 configuration
        space, also by name: "bar0" to "bar5", "rom", "config", "vga". Raises UsageError where the
        device has none."""
        self.refuse_closed()
        index = self._region_called(index) if isinstance(index, str) else operator.index(index)
        if index not in self._regions:
            info = self._region_info(index)
            if info is None or not info.size:
                present = [entry.index for entry in self.regions if entry and entry.size]
                raise UsageError(
                    f"{self.name} has no region {index}",
                    hint=f"it has {', '.join(map(str, present)) or 'none'}",
                    device=self.name,
                )
            kind = Config if index == CONFIG_REGION and self.info.is_pci else Region
            self._regions[index] = kind(self, info)
        return self._regions[index]

    def _region_called(self, name: str) -> int:
        if self.info.is_pci and name.lower() in REGION_NAMES:
            return REGION_NAMES[name.lower()]
        raise UsageError(
            f"{self.name} has no region called {name!r}",
            hint=", ".join(REGION_NAMES) if self.info.is_pci else "only PCI's have names",
            device=self.name,
        )

    def _region_info(self, index: int) -> RegionInfo | None:
        if index < len(self.regions) or index >= _REGION_LIMIT:
            return self.regions[index] if 0 <= index < len(self.regions) else None
        # A device may have more than it counts: mdpy's plane is in region 16 of 9 (mdpy.c).
        return self.ask_region(index)

    @property
    def config(self) -> Region:
        """PCI configuration space. Raises Unsupported for a device that is not PCI."""
        if not self.info.is_pci:
            raise Unsupported(f"{self.name} is no PCI device: it has no configuration space")
        return self.region(CONFIG_REGION)

    @property
    def command(self) -> int:
        """The COMMAND register."""
        return self.config.read16(COMMAND)

    @property
    def memory_decode(self) -> bool:
        """Whether the device answers to its memory BARs now; always true beyond PCI."""
        return not self.info.is_pci or bool(self.command & COMMAND_MEMORY)

    @property
    def unreachable(self) -> str | None:
        """Why mapped accesses are refused now, or None: memory decode is off, the device sleeps,
        is being reset, or is gone."""
        self.refuse_closed()
        return self.reach.reason

    def set_memory_decode(self, on: bool) -> None:
        """Turn Memory Space Enable on or off; while it is off mapped accesses are refused."""
        self._set_command(COMMAND_MEMORY, on)

    @property
    def bus_master(self) -> bool:
        """Whether the device may start DMA and send MSIs (COMMAND, Bus Master Enable)."""
        return self.info.is_pci and bool(self.command & COMMAND_MASTER)

    def set_bus_master(self, on: bool) -> None:
        """Turn Bus Master Enable on or off. It is off after open and after a reset. Raises
        KernelError where a PCI device does not take it."""
        if not self.info.is_pci:
            return
        self._set_command(COMMAND_MASTER, on)
        if self.target.bus == "pci" and self.bus_master != on:
            raise KernelError(f"{self.name} does not take Bus Master Enable", device=self.name)

    def _set_command(self, bit: int, on: bool) -> None:
        self.refuse_closed()
        with self.reach.lock:
            old = self.command
            new = old | bit if on else old & ~bit
            if new != old:
                self.config.write16(COMMAND, new)

    def reset(self) -> None:
        """Reset the device by itself (FLR and its kind). Bus mastering is off afterwards; its
        interrupts are armed again. Mapped accesses of other threads are refused meanwhile. Raises
        Unsupported where it has no such reset."""
        self.refuse_closed()
        if not self.info.has_reset:
            raise Unsupported(
                f"{self.name} has no reset of its own",
                hint="a hot reset of its bus may be possible: it takes other devices along",
                device=self.name,
            )
        with self.reach.resetting():
            self.calls.reset(self.name)
            if self.trace is not None:
                self.trace.record("reset")
            self.after_reset()

    def after_reset(self) -> None:
        """Bus mastering off, interrupts armed again."""
        self.set_bus_master(False)
        self.reach.refresh()
        self.irqs.rearm()

    def hot_reset_dependents(self) -> list[Dependent]:
        """The functions that a hot reset takes along, this one included. Raises Unsupported where
        neither slot nor bus can be reset."""
        try:
            with self.use() as fd:
                raw = native.hot_reset_info(fd, self.name)
        except KernelError as error:
            if error.errno_name not in ("ENODEV", "ENOTTY"):
                raise
            raise Unsupported(
                f"neither slot nor bus of {self.name} can be reset", device=self.name
            ) from error
        _, _, count = struct.unpack_from("=III", raw)
        found = []
        for index in range(min(count, (len(raw) - 12) // 8)):
            owner, segment, bus, devfn = struct.unpack_from("=iHBB", raw, 12 + 8 * index)
            address = f"{segment:04x}:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}"
            found.append(Dependent(address, owner))
        return found

    def hot_reset(self) -> list[Dependent]:
        """Reset the slot or bus of the device; returns what was reset.

        Every function concerned must be opened in this space (type1: its group); otherwise
        KernelError names them all. Raises Unsupported where neither can be reset, KernelError
        (ENOTTY) where they were reset but the kernel did not see them come back in time. As after
        `reset`, bus mastering of all of them is off and their interrupts are armed again.
        """
        dependents = self.hot_reset_dependents()
        concerned = {entry.address for entry in dependents}
        with contextlib.ExitStack() as stack:
            # In one order, whoever asks.
            devices = sorted(
                (device for device in self.space.devices if device.name in concerned),
                key=lambda device: device.name,
            )
            for device in devices:
                stack.enter_context(device.reach.resetting())
            self._hot_reset(dependents, devices)
        return dependents

    def _hot_reset(self, dependents: list[Dependent], devices: list[OpenDevice]) -> None:
        groups = sorted(
            {entry.group for entry in self.space.attachments if entry.group is not None}
        )
        listed = ", ".join(entry.address for entry in dependents)
        said, hint = f"it would reset {listed}", "open all of them in one address space first"
        try:
            with self.use() as fd:
                native.hot_reset(fd, groups, self.name)
        except VfiotoolError as error:
            # Of a slot or bus whose dependents it has told the kernel says ENOTTY only afterwards:
            # pci_bridge_wait_for_secondary_bus in drivers/pci/pci.c.
            if error.errno_name == "ENOTTY":
                self._after_hot_reset(devices)
                said = f"it reached {listed}, and the kernel did not see all come back in time"
                hint = "see dmesg: it may have been the link; they may work all the same"
            raise KernelError(
                f"{error}: {said}", hint=hint, device=self.name, errno_name=error.errno_name
            ) from error
        self._after_hot_reset(devices)

    def _after_hot_reset(self, devices: list[OpenDevice]) -> None:
        if self.trace is not None:
            self.trace.record("hot-reset")
        for device in devices:
            device.after_reset()

    def features(self) -> dict[str, bool]:
        """Which VFIO device features the kernel offers for this device, by probing each."""
        with self.use() as fd:
            return {
                name: native.feature(fd, number | FEATURE_PROBE)[0] >= 0
                for number, name in FEATURES.items()
            }

    def feature(self, number: int, operation: int, data: bytes = b"") -> bytes:
        """VFIO_DEVICE_FEATURE: `operation` is FEATURE_GET or FEATURE_SET, `data` goes in and
        comes back. Raises Unsupported where the kernel or the device has no such feature. What
        lets the device sleep, or wakes it, is as `low_power`."""
        flags = number | operation
        if flags & FEATURE_SET and not flags & FEATURE_PROBE and flags & 0xFFFF in _LOW_POWER:
            self.refuse_closed()
            answers: list[bytes] = []
            self.reach.low_power(
                _LOW_POWER[flags & 0xFFFF], lambda: answers.append(self._feature(flags, data))
            )
            return answers[0]
        return self._feature(flags, data)

    def _feature(self, flags: int, data: bytes = b"") -> bytes:
        number = flags & 0xFFFF
        with self.use() as fd:
            result, answer = native.feature(fd, flags, data)
        if result < 0:
            name = FEATURES.get(number, str(number))
            failure = native.failed(result, f"feature {name} of {self.name}", device=self.name)
            if failure.errno_name == "ENOTTY":
                raise Unsupported(f"{self.name} has no feature {name}", device=self.name)
            if failure.errno == errno.EOPNOTSUPP:
                # Dirty logs are only reported where iommufd is built (linux/iova_bitmap.h).
                raise Unsupported(
                    f"this kernel was built without what feature {name} of {self.name} needs",
                    hint="dma-logging-report needs CONFIG_IOMMUFD" if "logging" in name else None,
                    device=self.name,
                )
            raise failure
        return answer

    def set_vf_token(self, token: uuid.UUID) -> None:
        """On a PF: the secret that whoever opens one of its VFs must give (`vf_token`). Only while
        none is open. Raises Unsupported for what is no PF."""
        self.feature(0, FEATURE_SET, token.bytes)

    def low_power(self, on: bool) -> None:
        """Let the kernel put the device to sleep until it is accessed again, or wake it. Mapped
        accesses would be bus errors meanwhile: they are refused. Raises Unsupported where the
        kernel has no such feature (before Linux 6.1)."""
        self.feature(_LOW_POWER_ENTRY if on else _LOW_POWER_EXIT, FEATURE_SET)

    def on_close(self, quiesce: Callable[[], object]) -> None:
        """Call `quiesce` first of all when the device is closed; the last registered goes first."""
        self._quiesce.append(quiesce)

    def close(self) -> None:
        """Leave the device quiet and let go of it. Closing twice is nothing.

        Each step is done whatever became of the one before; the first error is raised at the end.
        """
        if self.generation != native.fork_generation():
            self._closed = True
            return
        with self._close_lock:
            if not self._closed and not self._closing:
                self._closing = True
                self._close()

    def _close(self) -> None:
        steps: list[Callable[[], object]] = [*reversed(self._quiesce), self._master_off]
        steps += [self.irqs.close, self.reach.close, self._close_mappings]
        if self.space.attachments == [self.attachment]:
            # A container loses its mappings with its last group.
            steps.append(self.dma.close)
        steps += [self._detach]
        if self._owns_space:
            steps.append(self.space.close)
        first: BaseException | None = None
        for step in steps:
            try:
                step()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _close_mappings(self) -> None:
        for mapping in self.mappings:
            mapping.close(even_pinned=True)

    def _master_off(self) -> None:
        if self.info.is_pci and not self.space.closed:
            self.set_bus_master(False)

    def _detach(self) -> None:
        self._closed = True
        if self in self.space.devices:
            self.space.devices.remove(self)
        self.space.detach(self.attachment)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
