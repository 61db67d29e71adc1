"""The one way to the C library: what it returns becomes values, what it refuses exceptions.

Every function here takes and gives plain numbers and bytes. A negative result of C is an errno;
`failed` turns it into the branch of `VfiotoolError` that it belongs to, and nobody else does.
Functions that can fail for a reason which the caller explains better take `device`, `hint` and
`branches` (errno -> exception class).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vfiotool.errors import (
    KernelError,
    NotPermitted,
    UsageError,
    VfiotoolError,
    errno_name,
)
from vfiotool.native import _types
from vfiotool.native._types import (
    Mapper,
    PinCount,
    QueueCalls,
    QueueCommand,
    SentCommand,
    SharedCalls,
    TurnLock,
    fork_generation,
    irq_action,
)

try:
    from vfiotool.native._library import ffi, lib
except ImportError as _missing:  # pragma: no cover - a broken installation
    raise VfiotoolError(
        f"vfiotool's C library cannot be loaded: {_missing}",
        hint="install vfiotool with a C compiler at hand: pip install .",
    ) from _missing

__all__ = [
    "Eventfd",
    "Handle",
    "Mapper",
    "PinCount",
    "QueueCalls",
    "QueueCommand",
    "SentCommand",
    "SharedCalls",
    "TurnLock",
    "Window",
    "ffi",
    "fork_generation",
    "irq_action",
    "lib",
]

WINDOW_READ = 1
WINDOW_WRITE = 2
_INFO_FIRST = 512
_INFO_LIMIT = 1 << 20

_REFUSALS = {
    1: "it is closed",
    2: "the device cannot be reached now",
    3: "this process is a child of the one that opened the device",
    4: "the region does not allow it",
    5: "it lies outside the mapped range",
    6: "offset or length is not a multiple of the width",
    7: "the value does not fit the width",
    8: "a queue or a loop in C keeps an address of it: close that first",
    9: "the time-out is not a number of seconds",
}
_ENDLESS_NS = 1 << 62


class Window(_types.Window):
    """A mapped part of a region; what it refuses it tells as UsageError.

    `description` is what it is called there, `unreachable` why the device cannot be reached.
    """

    description = "window"
    unreachable: str | None = None

    def _refuse(self, reason: int, offset: int, width: int) -> None:
        said = self.unreachable if reason == 2 and self.unreachable else _REFUSALS[reason]
        bytes_ = f", {width} byte{'s' if width > 1 else ''}" if width else ""
        raise UsageError(f"access to {self.description} at {offset:#x}{bytes_}: {said}")

    def refuse_access(self, offset: int = 0) -> None:
        """Raises the UsageError that an access would raise now: for C that found the gate shut."""
        self.address(offset or self.start, 1)
        raise UsageError(f"access to {self.description}: the device could not be reached meanwhile")


class Eventfd(_types.Event):
    """An eventfd that an interrupt signals; what it refuses it tells as UsageError."""

    description = "the interrupt"

    def _refuse(self, reason: int, _offset: int, _width: int) -> None:
        raise UsageError(f"{self.description}: {'is off' if reason == 1 else _REFUSALS[reason]}")


class Handle(_types.Handle):
    """A descriptor that is never closed under a call: `with handle as fd`. `description` is what it
    belongs to."""

    description = "the device"

    def _refuse(self, _reason: int, _offset: int, _width: int) -> None:
        raise UsageError(f"{self.description} is closed")


def queue_calls(queue: Any, done: Any, room: int, held: Any) -> QueueCalls:
    """The calls of an NVMe queue pair that never wait, with the interpreter's lock held: `done`
    has `room` places for completions, `held` counts those that are filled."""

    def address(of: Any) -> int:
        return int(ffi.cast("uintptr_t", of))

    submit, poll = ffi.addressof(lib, "vt_nvme_submit"), ffi.addressof(lib, "vt_nvme_poll")
    return QueueCalls(
        address(queue), address(submit), address(poll), address(done), address(held),
        room, (queue, done, held),
    )  # fmt: skip


def nanoseconds(timeout_s: float | None) -> int:
    """A time-out as the C loops take it: None and inf are no limit, less than 0 is now.

    Raises UsageError for NaN and for what is not a number.
    """
    if timeout_s is None:
        return _ENDLESS_NS
    try:
        number = float(timeout_s)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a time-out of {timeout_s!r} seconds is not a number") from error
    if number != number:
        raise UsageError("a time-out of NaN seconds is not a number")
    return round(min(max(number, 0.0), _ENDLESS_NS / 1e9) * 1e9)


def failed(
    result: int,
    operation: str,
    *,
    device: str | None = None,
    hint: str | None = None,
    branches: Mapping[int, type[VfiotoolError]] | None = None,
) -> VfiotoolError:
    """The exception for `result`, a negative errno: `operation` failed with it."""
    number = -result
    branch: type[VfiotoolError] = KernelError
    if number in (errno.EACCES, errno.EPERM):
        branch = NotPermitted
    if branches and number in branches:
        branch = branches[number]
    name = errno_name(number)
    message = f"{operation}: {os.strerror(number)} ({name})"
    return branch(message, hint=hint, device=device, errno_name=name)


def check(result: int, operation: str, **context: Any) -> int:
    """`result` if it is not an error; otherwise raises what `failed` makes of it."""
    if result < 0:
        raise failed(result, operation, **context)
    return result


def open_node(path: str) -> int:
    """Opens a device node read-write, close-on-exec. Returns a descriptor or a negative errno."""
    return int(lib.vt_open(os.fsencode(path)))


def close(descriptor: int) -> None:
    """Closes a descriptor; an error at closing changes nothing about it being closed."""
    lib.vt_close(descriptor)


def _grow(ask: Any, operation: str, device: str | None) -> bytes:
    room = _INFO_FIRST
    while True:
        buffer = ffi.new("char[]", room)
        needed = check(ask(buffer, room), operation, device=device)
        if needed <= room:
            return bytes(ffi.buffer(buffer, needed))
        if needed > _INFO_LIMIT:
            raise KernelError(f"{operation}: the kernel wants {needed} bytes", device=device)
        room = needed


def container_version(container: int) -> int:
    return check(lib.vt_container_version(container), "VFIO_GET_API_VERSION")


def container_check(container: int, extension: int) -> bool:
    """VFIO_CHECK_EXTENSION."""
    return bool(lib.vt_container_check(container, extension) > 0)


def container_set_iommu(container: int, kind: int) -> int:
    """VFIO_SET_IOMMU; returns 0 or a negative errno."""
    return int(lib.vt_container_set_iommu(container, kind))


def type1_info(container: int) -> bytes:
    """`struct vfio_iommu_type1_info` with its capabilities."""
    return _grow(lambda b, n: lib.vt_type1_info(container, b, n), "VFIO_IOMMU_GET_INFO", None)


def group_flags(group: int) -> int:
    """VFIO_GROUP_GET_STATUS: bit 0 viable, bit 1 in a container."""
    flags = ffi.new("uint32_t *")
    check(lib.vt_group_status(group, flags), "VFIO_GROUP_GET_STATUS")
    return int(flags[0])


def group_set_container(group: int, container: int) -> int:
    """VFIO_GROUP_SET_CONTAINER; returns 0 or a negative errno."""
    return int(lib.vt_group_set_container(group, container))


def group_unset_container(group: int) -> None:
    lib.vt_group_unset_container(group)


def group_device(group: int, name: str) -> int:
    """VFIO_GROUP_GET_DEVICE_FD; returns a descriptor or a negative errno."""
    return int(lib.vt_group_device(group, name.encode()))


def device_info(device: int, name: str) -> bytes:
    """`struct vfio_device_info` with its capabilities."""
    return _grow(lambda b, n: lib.vt_device_info(device, b, n), "VFIO_DEVICE_GET_INFO", name)


def region_info(device: int, index: int, name: str) -> bytes | None:
    """`struct vfio_region_info` with its capabilities; None where the device has no such region
    (EINVAL, as vfio-pci answers for VGA)."""
    try:
        return _grow(
            lambda b, n: lib.vt_region_info(device, index, b, n),
            f"VFIO_DEVICE_GET_REGION_INFO, region {index}",
            name,
        )
    except KernelError as error:
        if error.errno_name in ("EINVAL", "ENODEV"):
            return None
        raise


def irq_info(device: int, index: int) -> tuple[int, int] | None:
    """(flags, count) of an interrupt index; None where the device has none (EINVAL)."""
    out = ffi.new("uint32_t[2]")
    result = lib.vt_irq_info(device, index, out, out + 1)
    if result in (-errno.EINVAL, -errno.ENODEV, -errno.ENOTTY):
        return None
    check(result, f"VFIO_DEVICE_GET_IRQ_INFO, index {index}")
    return int(out[0]), int(out[1])


def device_reset(device: int, name: str) -> None:
    check(lib.vt_device_reset(device), f"reset {name}", device=name)


def hot_reset_info(device: int, name: str) -> bytes:
    """`struct vfio_pci_hot_reset_info` with its dependent devices. Raises KernelError ENODEV
    where no bus or slot reset exists."""
    room = 12 + 8 * 16
    while True:
        buffer = ffi.new("char[]", room)
        result = lib.vt_hot_reset_info(device, buffer, room)
        if result == -errno.ENOSPC and room < _INFO_LIMIT:
            room *= 4
            continue
        check(result, f"VFIO_DEVICE_GET_PCI_HOT_RESET_INFO of {name}", device=name)
        return bytes(ffi.buffer(buffer, room))


def hot_reset(device: int, group_fds: Sequence[int], name: str) -> None:
    fds = ffi.new("int32_t[]", list(group_fds))
    check(lib.vt_hot_reset(device, fds, len(group_fds)), f"hot reset of {name}", device=name)


def feature(device: int, flags: int, data: bytes = b"") -> tuple[int, bytes]:
    """VFIO_DEVICE_FEATURE: (0 or a negative errno, the data as the kernel left it)."""
    buffer = ffi.new("char[]", data) if data else ffi.NULL
    result = lib.vt_device_feature(device, flags, buffer, len(data))
    return int(result), bytes(ffi.buffer(buffer, len(data))) if data else b""


def region_read(device: int, position: int, width: int, what: Callable[[], str]) -> int:
    """One read of exactly `width` bytes at a file position; `what` names it for an error."""
    value = ffi.new("uint64_t *")
    result = lib.vt_region_read(device, position, width, value)
    if result < 0:
        raise failed(result, f"read {what()}")
    return int(value[0])


def region_write(
    device: int, position: int, width: int, value: int, what: Callable[[], str]
) -> None:
    """One write of exactly `width` bytes at a file position."""
    result = lib.vt_region_write(device, position, width, value)
    if result < 0:
        raise failed(result, f"write {what()}")


def region_copy_out(device: int, position: int, buffer: Any, what: str) -> None:
    """Fills a writable buffer from the region through `pread`; the kernel chooses the widths."""
    with ffi.from_buffer("char[]", buffer, require_writable=True) as raw:
        check(lib.vt_region_copy_out(device, position, raw, len(raw)), f"read {what}")


def region_copy_in(device: int, position: int, buffer: Any, what: str) -> None:
    """Writes a buffer to the region through `pwrite`; the kernel chooses the widths."""
    with ffi.from_buffer("char[]", buffer) as raw:
        check(lib.vt_region_copy_in(device, position, raw, len(raw)), f"write {what}")


def type1_dirty_track(container: int, start: bool) -> int:
    return int(lib.vt_type1_dirty_track(container, start))


def type1_dirty_bitmap(container: int, iova: int, size: int, page_size: int) -> bytes:
    """One bit a page, least significant first, in whole 64-bit words."""
    bitmap = bytearray(bitmap_bytes(size, page_size))
    with ffi.from_buffer("char[]", bitmap, require_writable=True) as raw:
        result = lib.vt_type1_dirty_bitmap(container, iova, size, page_size, raw, len(raw))
    check(result, "VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP")
    return bytes(bitmap)


def bitmap_bytes(size: int, page_size: int) -> int:
    """The bytes of a dirty bitmap over `size` bytes, in whole 64-bit words."""
    return (-(-size // page_size) + 63) // 64 * 8


def ioas_alloc(iommufd: int) -> int:
    number = ffi.new("uint32_t *")
    check(lib.vt_iommufd_ioas_alloc(iommufd, number), "IOMMU_IOAS_ALLOC")
    return int(number[0])


def iommufd_destroy(iommufd: int, number: int) -> int:
    return int(lib.vt_iommufd_destroy(iommufd, number))


def ioas_ranges(iommufd: int, ioas: int) -> list[tuple[int, int]]:
    """The allowed (start, last) pairs of an I/O address space."""
    room = 16
    while True:
        pairs = ffi.new("uint64_t[]", 2 * room)
        count = ffi.new("uint32_t *")
        alignment = ffi.new("uint64_t *")
        result = lib.vt_iommufd_ranges(iommufd, ioas, pairs, room, count, alignment)
        if result == -errno.EMSGSIZE and room < count[0] <= _INFO_LIMIT:
            room = int(count[0])
            continue
        check(result, "IOMMU_IOAS_IOVA_RANGES")
        return [(int(pairs[2 * i]), int(pairs[2 * i + 1])) for i in range(count[0])]


def dirty_hwpt(iommufd: int, devid: int, ioas: int) -> int:
    """IOMMU_HWPT_ALLOC with dirty tracking; returns its id or a negative errno."""
    number = ffi.new("uint32_t *")
    result = lib.vt_iommufd_dirty_hwpt(iommufd, devid, ioas, number)
    return int(result) if result < 0 else int(number[0])


def hwpt_dirty_track(iommufd: int, hwpt: int, start: bool) -> int:
    return int(lib.vt_iommufd_dirty_track(iommufd, hwpt, start))


def hwpt_dirty_bitmap(iommufd: int, hwpt: int, iova: int, size: int, page_size: int) -> bytes:
    """As `type1_dirty_bitmap`."""
    bitmap = bytearray(bitmap_bytes(size, page_size))
    with ffi.from_buffer("char[]", bitmap, require_writable=True) as raw:
        result = lib.vt_iommufd_dirty_bitmap(iommufd, hwpt, iova, size, page_size, raw)
    check(result, "IOMMU_HWPT_GET_DIRTY_BITMAP")
    return bytes(bitmap)


def cdev_bind(device: int, iommufd: int) -> int:
    """VFIO_DEVICE_BIND_IOMMUFD; returns the device's id or a negative errno."""
    number = ffi.new("uint32_t *")
    result = lib.vt_cdev_bind(device, iommufd, number)
    return int(result) if result < 0 else int(number[0])


def cdev_attach(device: int, page_table: int) -> int:
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT; returns 0 or a negative errno."""
    return int(lib.vt_cdev_attach(device, page_table))


def cdev_detach(device: int) -> int:
    return int(lib.vt_cdev_detach(device))


def irq_assign(device: int, index: int, start: int, descriptors: Sequence[int]) -> int:
    """VFIO_DEVICE_SET_IRQS with eventfds; 0, a negative errno, or a positive number of vectors,
    which is a failure as well."""
    fds = ffi.new("int32_t[]", list(descriptors))
    return int(lib.vt_irq_assign(device, index, start, fds, len(descriptors)))


def irq_unmask_fd(device: int, index: int, descriptor: int) -> int:
    return int(lib.vt_irq_unmask_fd(device, index, descriptor))


def eventfd() -> int:
    """A new eventfd for an `Eventfd`: close-on-exec, not blocking, at zero."""
    return check(lib.vt_eventfd(), "eventfd")


def address_of(buffer: Any) -> int:
    """The address of a buffer's first byte, for as long as whoever asks keeps the buffer."""
    with ffi.from_buffer("char[]", buffer) as raw:
        return int(ffi.cast("uintptr_t", raw))


def memory_dont_fork(address: int, size: int) -> None:
    """MADV_DONTFORK on the pages."""
    check(lib.vt_memory_dont_fork(address, size), "madvise(MADV_DONTFORK)")


def memory_plug(address: int, size: int) -> int:
    """Zero pages into the hole that MADV_DONTFORK left in a child; 0 or a negative errno."""
    return int(lib.vt_memory_plug(address, size))


def fault_set(nth: int, error: int) -> int:
    """Test builds: the `nth` call into the kernel from now on fails with `error`. Returns the
    calls seen since the last setting, or -ENOSYS in a build without fault injection."""
    return int(lib.vt_fault_set(nth, error))
