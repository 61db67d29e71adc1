"""An address space over iommufd and the device's own character device.

Source: Documentation/userspace-api/iommufd.rst; "IOMMUFD and VFIO cdev" in
Documentation/driver-api/vfio.rst; <linux/iommufd.h>.
"""

from __future__ import annotations

import errno
import mmap
from typing import NoReturn

from vfiotool.errors import KernelError, Refused, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU
from vfiotool.native import library as native
from vfiotool.vfio.iova import PAGE
from vfiotool.vfio.space import (
    GROUP_VIABLE,
    AddressSpace,
    Attachment,
    file_of,
    let_go,
    map_failure,
    open_failure,
)
from vfiotool.vfio.target import Target, not_on_vfio


class IommufdSpace(AddressSpace):
    """An I/O address space object (IOAS) of an iommufd of its own."""

    name = "iommufd"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        result = native.open_node(DEV_IOMMU)
        if result < 0:
            self.closed = True
            raise open_failure(result, DEV_IOMMU, "an address space")
        self.iommufd = file_of(result, "the address space")
        try:
            self.ioas = native.ioas_alloc(result)
            self._aim(self.iommufd, self.ioas)
        except BaseException:
            self.close()
            raise
        self._tracking: list[int] = []

    def _attach(self, target: Target, vf_token: str | None) -> Attachment:
        if target.cdev_node is None:
            raise not_on_vfio(target)
        if vf_token is not None:
            raise Unsupported(
                "a VF token cannot be given through iommufd by this kernel interface",
                hint="open it with the type1 backend",
                device=target.name,
            )
        descriptor = native.open_node(target.cdev_node)
        if descriptor < 0:
            raise open_failure(descriptor, target.cdev_node, target.name)
        with self.iommufd as fd:
            device_id = native.cdev_bind(descriptor, fd)
        result = device_id if device_id < 0 else native.cdev_attach(descriptor, self.ioas)
        if result < 0:
            native.close(descriptor)
            raise self._attach_failure(result, target, bound=device_id >= 0)
        return Attachment(target, file_of(descriptor, target.name), None, device_id)

    def _attach_failure(self, number: int, target: Target, *, bound: bool) -> Exception:
        verb = "attach" if bound else "bind"
        busy = number == -errno.EBUSY
        if number in (-errno.EINVAL, -errno.EPERM) and not bound:
            # The kernel says EINVAL of a second open and of a group that is not viable alike, and
            # EPERM where a bridge's driver claims the group's DMA (iommu_device_claim_dma_owner).
            busy, viable = _group_state(target)
            if not busy and not viable:
                return Refused(
                    f"group {target.group} is not viable: a member is still on a host driver",
                    hint=f"vfiotool why {target.name}",
                    device=target.name,
                )
        if busy:
            number = -errno.EBUSY
        failure = native.failed(number, f"{verb} {target.name} to iommufd", device=target.name)
        if busy:
            failure.hint = "it, or its group, is open elsewhere: end that program first"
        return failure

    def _detach(self, attachment: Attachment) -> None:
        # Closing the device detaches and unbinds it.
        let_go(attachment.handle)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        self.refuse_closed()
        raise map_failure(result, address, iova, size, self.host, per_user=True)

    def _cuts(self, result: int, iova: int, size: int) -> bool:
        # ENOENT is said of nothing at all and of a part of a mapping alike. A mapping that would be
        # cut covers the first or the last page of the range.
        return result == -errno.ENOENT and (
            self._is_mapped(iova) or self._is_mapped(iova + size - PAGE)
        )

    def _is_mapped(self, iova: int) -> bool:
        """Whether the page at `iova` is mapped: found by asking to map memory there that cannot be
        mapped, which fails with EEXIST before the memory is looked at."""
        with mmap.mmap(-1, PAGE, prot=0) as nothing:
            try:
                self.map(native.address_of(nothing), iova, PAGE, read=True, write=False)
            except UsageError:
                return True
            except VfiotoolError:
                return False
            # No device is attached: then the memory is not looked at.
            self.unmap(iova, PAGE)
        return False

    def unmap_all(self) -> int:
        self.refuse_closed()
        result = self._unmap_all()
        return 0 if result == -errno.ENOENT else native.check(result, "unmap all")

    def ranges(self) -> tuple[tuple[int, int], ...]:
        with self.iommufd as fd:
            return tuple(native.ioas_ranges(fd, self.ioas))

    def page_sizes(self) -> int:
        # iommufd tells no sizes, only the alignment it demands, which is at most a page.
        return 4096

    def dirty_track(self, start: bool) -> None:
        with self.iommufd as fd:
            if not start:
                for page_table in self._tracking:
                    native.hwpt_dirty_track(fd, page_table, False)
                return
            if not self._tracking:
                self._tracking = [self._dirty_table(fd, entry) for entry in self.attachments]
            for page_table in self._tracking:
                native.check(
                    native.hwpt_dirty_track(fd, page_table, True),
                    "start tracking dirty pages",
                )

    def _dirty_table(self, iommufd: int, attachment: Attachment) -> int:
        page_table = native.dirty_hwpt(iommufd, attachment.device_id or 0, self.ioas)
        native.check(
            page_table,
            f"make a page table with dirty tracking for {attachment.target.name}",
            hint="the IOMMU must be able to mark pages as written",
            branches={errno.EOPNOTSUPP: Unsupported, errno.EINVAL: Unsupported},
        )
        with attachment.handle as device:
            native.check(
                native.cdev_attach(device, page_table),
                f"attach {attachment.target.name} to its page table",
            )
        return page_table

    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        if not self._tracking:
            raise KernelError("dirty pages are not being tracked", hint="dirty_track(True) first")
        merged = bytearray(native.bitmap_bytes(size, page_size))
        with self.iommufd as fd:
            for page_table in self._tracking:
                part = native.hwpt_dirty_bitmap(fd, page_table, iova, size, page_size)
                for index, byte in enumerate(part):
                    merged[index] |= byte
        return bytes(merged)

    def _handles(self) -> list[native.Handle]:
        return [self.iommufd]


def _group_state(target: Target) -> tuple[bool, bool]:
    """Whether the device's group is in use elsewhere, and whether it is viable."""
    if target.group_node is None:
        return False, True
    group = native.open_node(target.group_node)
    if group < 0:
        return group == -errno.EBUSY, True
    try:
        return False, bool(native.group_flags(group) & GROUP_VIABLE)
    finally:
        native.close(group)
