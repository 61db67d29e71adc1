"""One address space for devices' DMA, over either of the kernel's two interfaces.

`open_space` chooses once: `iommufd` where the kernel has it and the device has a character
device, else `type1` (container and group). `noiommu` is taken only when asked for by name: it
gives a device the whole memory, needs CAP_SYS_RAWIO and taints the kernel. Everything above this
module sees an `AddressSpace` and cannot tell which it is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import warnings
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from vfiotool.errors import KernelError, NotPermitted, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU, DEV_VFIO, PROC
from vfiotool.native import library as native
from vfiotool.vfio.target import Target, not_on_vfio

if TYPE_CHECKING:
    from vfiotool.vfio.device import Device
    from vfiotool.vfio.dma import Dma

BACKENDS = ("auto", "iommufd", "type1", "noiommu")
CONTAINER_NODE = f"{DEV_VFIO}/vfio"
GROUP_VIABLE = 1  # VFIO_GROUP_FLAGS_VIABLE
ALL_ADDRESSES = ((0, (1 << 64) - 1),)


@dataclass(slots=True)
class Attachment:
    """A device opened in a space: `descriptor` is its file, `group` its group's (or None)."""

    target: Target
    descriptor: int
    group: int | None
    device_id: int | None = None


class AddressSpace(native.Mapper, ABC):
    """I/O virtual addresses that one or more devices share, and the devices opened in it.

    Mapping is C (`cext/mapper_type.c`):

    `map(address, iova, size, *, read, write)` lets devices read and write `size` bytes of this
    process at `iova`; `map_many(rows, *, read, write)` does so for each row (address, iova, size),
    all of them or none. Raise UsageError where something is mapped already, KernelError.
    `unmap(iova, size)` takes mappings away and returns the bytes that were mapped, which may be 0;
    `unmap_many(rows)` does so for each row (iova, size). Rows are a sequence of tuples or, faster,
    a buffer of unsigned 64-bit numbers such as `array("Q")` or a numpy array.

    Close it after its devices; a `Device` that made its own space does so itself. In a child
    process it is of no use: its descriptors are closed there, so that they hold nothing.
    """

    name: str

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.generation = native.fork_generation()
        self.attachments: list[Attachment] = []
        self.devices: list[Device] = []
        self.closed = False
        self._dma: Dma | None = None
        _live.add(self)

    @abstractmethod
    def attach(self, target: Target, vf_token: str | None = None) -> Attachment:
        """Open `target` in this space. Raises Refused (not on a VFIO driver, group not viable),
        NotPermitted, KernelError (EBUSY: it is open elsewhere) or Unsupported."""

    @abstractmethod
    def detach(self, attachment: Attachment) -> None:
        """Close what `attach` opened."""

    @abstractmethod
    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        """Raise for a mapping that failed with `result`, a negative errno."""

    @abstractmethod
    def _unmap_failed(self, result: int, iova: int, size: int) -> int:
        """The bytes that were mapped in spite of `result`, a negative errno; or raise for it."""

    @abstractmethod
    def unmap_all(self) -> int:
        """Take all mappings away; returns the bytes that were mapped."""

    @abstractmethod
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The (start, last) pairs that may be mapped now; attaching a device narrows them."""

    @abstractmethod
    def page_sizes(self) -> int:
        """The sizes of pages that the IOMMU knows, as a bitmap."""

    @abstractmethod
    def dirty_track(self, start: bool) -> None:
        """Begin or end recording which pages devices write."""

    @abstractmethod
    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        """Which pages of a mapped range devices have written since the last call: one bit a
        page, least significant first, in whole 64-bit words."""

    @abstractmethod
    def _descriptors(self) -> list[int]:
        """The descriptors of the space itself, in the order of closing."""

    @property
    def dma(self) -> Dma:
        """The buffers of this space, shared by its devices."""
        if self._dma is None:
            from vfiotool.vfio.dma import Dma

            self._dma = Dma(self)
        return self._dma

    def refuse_child(self) -> None:
        """Raises UsageError in a child of the process that opened the space."""
        if self.generation != native.fork_generation():
            raise UsageError(
                "this process is a child of the one that opened the device",
                hint="open the device after the fork, in the process that drives it",
            )

    def refuse_closed(self) -> None:
        self.refuse_child()
        if self.closed:
            raise UsageError("the address space is closed")

    def close(self) -> None:
        """Close the devices still open, all mappings and the space. Closing twice is nothing."""
        if self.closed:
            return
        if self.generation != native.fork_generation():
            self.closed = True
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_descriptors)
            if self._dma is not None:
                stack.callback(self._dma.close)
            for device in list(self.devices):
                stack.callback(device.close)

    def _close_descriptors(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._aim(-1, None)
        _live.discard(self)
        for attachment in list(self.attachments):
            self.detach(attachment)
        for descriptor in self._descriptors():
            native.close(descriptor)

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            message = f"an address space over {self.name} was not closed"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                self.close()

    def abandon(self) -> None:
        """In a child: let go of the parent's descriptors, and touch nothing else."""
        for descriptor in (
            *(entry.descriptor for entry in self.attachments),
            *(entry.group for entry in self.attachments if entry.group is not None),
            *self._descriptors(),
        ):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.attachments.clear()
        self._aim(-1, None)
        self.closed = True

    def __enter__(self) -> AddressSpace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_live: weakref.WeakSet[AddressSpace] = weakref.WeakSet()


def _after_fork() -> None:
    for space in list(_live):
        space.abandon()


os.register_at_fork(after_in_child=_after_fork)


def open_space(target: Target, backend: str = "auto", host: Host | None = None) -> AddressSpace:
    """A new, empty address space over the interface `backend` (one of `BACKENDS`) that suits
    `target`, which is not opened yet.

    Raises UsageError for an unknown name, Refused where the device is not on a VFIO driver,
    Unsupported where the kernel or the device lacks the interface.
    """
    from vfiotool.vfio.iommufd import IommufdSpace
    from vfiotool.vfio.type1 import Type1Space

    host = host or Host.local()
    if backend not in BACKENDS:
        raise UsageError(f"{backend!r} is no backend", hint=f"one of: {', '.join(BACKENDS)}")
    if not host.live:
        raise UsageError(
            f"{host.name} is not the running host: no device can be opened there",
            hint="leave out --root",
        )
    if target.group_node is None and target.cdev_node is None:
        raise not_on_vfio(target)
    if target.noiommu and backend != "noiommu":
        raise Unsupported(
            f"{target.name} is in a no-IOMMU group: its DMA would reach all of memory",
            hint="turn the IOMMU on (vfiotool doctor), or ask for --backend noiommu by name",
            device=target.name,
        )
    has_iommufd = host.exists(DEV_IOMMU) and target.cdev_node is not None
    if backend == "iommufd" and not has_iommufd:
        raise Unsupported(
            f"{target.name} has no character device for iommufd",
            hint="needs a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
            device=target.name,
        )
    if backend == "iommufd" or (backend == "auto" and has_iommufd):
        return IommufdSpace(host)
    if target.group_node is None or not host.exists(CONTAINER_NODE):
        raise Unsupported(
            f"{target.name} has no VFIO group to open",
            hint="needs a kernel with CONFIG_VFIO_GROUP and the module vfio_iommu_type1",
            device=target.name,
        )
    return Type1Space(host, noiommu=backend == "noiommu")


def open_failure(number: int, node: str, device: str) -> VfiotoolError:
    """Why a VFIO device node could not be opened (`number` is a negative errno)."""
    name = os.path.basename(node)
    failure = native.failed(number, f"open {node} for {device}", device=device)
    if failure.errno_name == "EBUSY":
        failure.hint = f"{name} is open elsewhere: end that program first (fuser -v {node})"
    elif isinstance(failure, NotPermitted):
        failure.hint = f"be root, or own {node} (chown it, or add a udev rule)"
        if "noiommu" in name:
            failure.hint = "a no-IOMMU group needs CAP_SYS_RAWIO: run as root"
    return failure


def map_failure(
    number: int, address: int, iova: int, size: int, host: Host, *, per_user: bool
) -> VfiotoolError:
    """Why a mapping failed; a shortage of lockable memory is explained with what is missing."""
    failure = native.failed(number, f"map {size} bytes at I/O address {iova:#x}")
    if failure.errno_name == "ENOMEM":
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY:
            locked = _locked_bytes(host)
            whose = "this user's locked memory" if per_user else "this process"
            missing = max(size + locked - limit, 0)
            failure.hint = (
                f"{whose} may lock {limit} bytes (RLIMIT_MEMLOCK), {locked} of them are locked by "
                f"this process: {missing} bytes are missing; raise it with ulimit -l "
                f"{(size + locked + 1023) // 1024} or run with CAP_IPC_LOCK"
            )
    elif failure.errno_name == "EEXIST":
        failure = UsageError(f"I/O address {iova:#x}, {size} bytes: something is mapped there")
    elif failure.errno_name == "EFAULT":
        failure = KernelError(
            f"map {size} bytes at {address:#x}: not memory of this process, or not writable",
            errno_name="EFAULT",
        )
    elif failure.errno_name == "ENOSPC":
        failure.hint = "a container holds 65535 mappings: map larger pieces"
    return failure


def _locked_bytes(host: Host) -> int:
    for line in (host.read(f"{PROC}/self/status") or "").splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0
