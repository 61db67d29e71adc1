"""One address space for devices' DMA: what is common to both of the kernel's interfaces.

`AddressSpace` is what everything above sees; `type1.py` (container and group) and `iommufd.py` make
it, and `backend.py` chooses. Both give the same answers and errors: the table is in
docs/driver-guide.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from vfiotool.errors import KernelError, NotPermitted, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_VFIO, PROC
from vfiotool.native import library as native
from vfiotool.vfio.calls import DeviceCalls
from vfiotool.vfio.iova import PAGE
from vfiotool.vfio.opened import (
    OpenDevice,
    enter_open,
    leave_open,
    refuse_child,
    refuse_pickle,
)
from vfiotool.vfio.target import Target, bus_windows

CONTAINER_NODE = f"{DEV_VFIO}/vfio"
GROUP_VIABLE = 1  # VFIO_GROUP_FLAGS_VIABLE
ALL_ADDRESSES = ((0, (1 << 64) - 1),)
# How long closing waits for calls of other threads that are under way.
_CLOSE_WAIT_S = 1.0


class StillMapped(KernelError):
    """A mapping failed, and so did taking back what had been mapped: some of it may be mapped."""


@dataclass(slots=True)
class Attachment:
    """A device opened in a space: `handle` is its file, `group` its group's descriptor or None.
    `calls` asks it where the kernel is not behind it."""

    target: Target
    handle: native.Handle
    group: int | None
    device_id: int | None = None
    calls: DeviceCalls | None = None


def file_of(descriptor: int, description: str) -> native.Handle:
    """The handle that owns an open descriptor."""
    handle = native.Handle(descriptor)
    handle.description = description
    return handle


def let_go(handle: native.Handle) -> None:
    """Close it, and give calls of other threads a moment to leave it: what is closed next (its
    group, its container) depends on it."""
    handle.close()
    end = time.monotonic() + _CLOSE_WAIT_S
    while handle.users and time.monotonic() < end:
        time.sleep(1e-4)


class AddressSpace(native.Mapper, ABC):
    """I/O virtual addresses that one or more devices share, and the devices opened in it.

    Mapping is C (`cext/python/mapper_type.c`):

    `map(address, iova, size, *, read, write)` lets devices read and write `size` bytes of this
    process at `iova`; `map_many(rows, *, read, write)` does so for each row (address, iova, size),
    all of them or none. Raise UsageError where something is mapped already, KernelError.
    `unmap(iova, size)` takes mappings away and returns the bytes that were mapped, which may be 0;
    `unmap_many(rows)` does so for each row (iova, size). Raise UsageError for a part of a mapping.
    Rows are a sequence of tuples or, faster,
    a buffer of unsigned 64-bit numbers such as `array("Q")` or a numpy array.

    Close it after its devices; a `Device` that made its own space does so itself. In a child
    process it is of no use: its descriptors are closed there, so that they hold nothing.
    """

    name: str
    # Whether devices reach memory by the file that it is of, and not by its address.
    shares_memory = False

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.generation = native.fork_generation()
        self.attachments: list[Attachment] = []
        self.devices: list[OpenDevice] = []
        self.closed = False
        self.lock = threading.RLock()
        # What holds memory of the space: closed after its devices.
        self.closers: list[Callable[[], object]] = []
        _live.add(self)

    __reduce_ex__ = refuse_pickle

    def __repr__(self) -> str:
        inside = ", ".join(entry.target.name for entry in self.attachments) or "no device"
        return f"<AddressSpace over {self.name}, {'closed' if self.closed else inside}>"

    def attach(self, target: Target, vf_token: str | None = None) -> Attachment:
        """Open `target` in this space. Raises Refused (not on a VFIO driver, group not viable),
        NotPermitted, KernelError (EBUSY: it is open elsewhere, or in this process) or
        Unsupported."""
        self.refuse_closed()
        with self.lock:
            if not enter_open(target.name):
                raise KernelError(
                    f"open {target.name}: it is open in this process already (EBUSY)",
                    hint="close that Device first, or use it",
                    device=target.name,
                    errno_name="EBUSY",
                )
            try:
                attachment = self._attach(target, vf_token)
            except BaseException:
                leave_open(target.name)
                raise
            self.attachments.append(attachment)
            return attachment

    def windows(self) -> tuple[tuple[int, int], ...]:
        """Addresses that buses of its devices may take for a BAR (`target.bus_windows`)."""
        with self.lock:
            targets = [attachment.target for attachment in self.attachments]
        return tuple(one for target in targets for one in bus_windows(target, self.host))

    def detach(self, attachment: Attachment) -> None:
        """Close what `attach` opened."""
        with self.lock:
            if attachment not in self.attachments:
                return
            self.attachments.remove(attachment)
            try:
                self._detach(attachment)
            finally:
                leave_open(attachment.target.name)

    @abstractmethod
    def _attach(self, target: Target, vf_token: str | None) -> Attachment:
        """Open it; what it raises is said at `attach`."""

    @abstractmethod
    def _detach(self, attachment: Attachment) -> None:
        """Close the device, and its group with the last of its devices."""

    def lending(self, files: dict[int, int]) -> contextlib.AbstractContextManager[None]:
        """Within the block `map` finds here the descriptor of the file that begins at an address;
        only where `shares_memory`."""
        return contextlib.nullcontext()

    @abstractmethod
    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        """Raise for a mapping that failed with `result`, a negative errno."""

    def _unmap_failed(self, result: int, iova: int, size: int) -> int:
        """The bytes that were mapped in spite of `result`, a negative errno; or raise for it."""
        self.refuse_closed()
        operation = f"unmap {size} bytes at I/O address {iova:#x}"
        if not size or (iova | size) % PAGE:
            raise UsageError(f"{operation}: not whole pages of {PAGE} bytes")
        if self._cuts(result, iova, size):
            raise UsageError(f"{operation}: it would cut a mapping in two")
        if result == -errno.ENOENT:
            return 0
        raise native.failed(result, operation)

    @abstractmethod
    def _cuts(self, result: int, iova: int, size: int) -> bool:
        """Whether an unmap of whole pages failed with `result` because it names a part of a
        mapping."""

    def _roll_back_failed(self, result: int, back: int, iova: int, size: int) -> NoReturn:
        name, again = native.failed(result, "map"), native.failed(back, "unmap")
        raise StillMapped(
            f"map {size} bytes at I/O address {iova:#x}: {name.errno_name}; and what was mapped "
            f"before it could not be taken back: {again.errno_name}",
            hint="close the device: what may still be mapped ends with it",
            errno_name=name.errno_name,
        )

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
    def _handles(self) -> list[native.Handle]:
        """The files of the space itself, in the order of closing."""

    def refuse_closed(self) -> None:
        """Raises UsageError once it is closed, and in a child of the process that opened it."""
        refuse_child(self.generation)
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
            stack.callback(self._close_files)
            for closer in self.closers:
                stack.callback(closer)
            for device in list(self.devices):
                stack.callback(device.close)

    def _close_files(self) -> None:
        if self.closed:
            return
        self.closed = True
        _live.discard(self)
        for attachment in list(self.attachments):
            self.detach(attachment)
        for handle in self._handles():
            let_go(handle)

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            message = f"an address space over {self.name} was not closed"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):
                self.close()

    def abandon(self) -> None:
        """In a child: let go of the parent's descriptors, and touch nothing else."""
        if self.closed:
            return
        for entry in self.attachments:
            entry.handle.close(True)
        for group in {entry.group for entry in self.attachments if entry.group is not None}:
            with contextlib.suppress(OSError):
                os.close(group)
        for handle in self._handles():
            handle.close(True)
        self.attachments.clear()
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
    elif failure.errno_name == "EINVAL" and (address | iova | size) % PAGE:
        failure = UsageError(
            f"map {size} bytes at {address:#x}, I/O address {iova:#x}: not whole pages of {PAGE} "
            "bytes"
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
