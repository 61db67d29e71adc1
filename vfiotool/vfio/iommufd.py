"""An address space over iommufd and the device's own character device.

Source: Documentation/userspace-api/iommufd.rst; "IOMMUFD and VFIO cdev" in
Documentation/driver-api/vfio.rst; <linux/iommufd.h>.
"""

from __future__ import annotations

import errno
from typing import NoReturn

from vfiotool.errors import KernelError, Refused, Unsupported
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_IOMMU
from vfiotool.native import library as native
from vfiotool.vfio.backend import (
    GROUP_VIABLE,
    AddressSpace,
    Attachment,
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
        self.iommufd = result
        try:
            self.ioas = native.ioas_alloc(self.iommufd)
            self._aim(self.iommufd, self.ioas)
        except BaseException:
            self.close()
            raise
        self._tracking: list[int] = []

    def attach(self, target: Target, vf_token: str | None = None) -> Attachment:
        self.refuse_closed()
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
        device_id = native.cdev_bind(descriptor, self.iommufd)
        result = device_id if device_id < 0 else native.cdev_attach(descriptor, self.ioas)
        if result < 0:
            native.close(descriptor)
            raise self._attach_failure(result, target, bound=device_id >= 0)
        attachment = Attachment(target, descriptor, None, device_id)
        self.attachments.append(attachment)
        return attachment

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

    def detach(self, attachment: Attachment) -> None:
        if attachment not in self.attachments:
            return
        self.attachments.remove(attachment)
        # Closing the device detaches and unbinds it.
        native.close(attachment.descriptor)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        self.refuse_closed()
        raise map_failure(result, address, iova, size, self.host, per_user=True)

    def _unmap_failed(self, result: int, iova: int, size: int) -> int:
        self.refuse_closed()
        if result == -errno.ENOENT:
            # Nothing there, or a part of a mapping: iommufd says the same of both.
            return 0
        raise native.failed(result, f"unmap {size} bytes at I/O address {iova:#x}")

    def unmap_all(self) -> int:
        result = native.ioas_unmap_all(self.iommufd, self.ioas)
        return 0 if result == -errno.ENOENT else native.check(result, "unmap all")

    def ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(native.ioas_ranges(self.iommufd, self.ioas))

    def page_sizes(self) -> int:
        # iommufd tells no sizes, only the alignment it demands, which is at most a page.
        return 4096

    def dirty_track(self, start: bool) -> None:
        if not start:
            for page_table in self._tracking:
                native.hwpt_dirty_track(self.iommufd, page_table, False)
            return
        if not self._tracking:
            self._tracking = [self._dirty_table(entry) for entry in self.attachments]
        for page_table in self._tracking:
            native.check(
                native.hwpt_dirty_track(self.iommufd, page_table, True),
                "start tracking dirty pages",
            )

    def _dirty_table(self, attachment: Attachment) -> int:
        page_table = native.dirty_hwpt(self.iommufd, attachment.device_id or 0, self.ioas)
        native.check(
            page_table,
            f"make a page table with dirty tracking for {attachment.target.name}",
            hint="the IOMMU must be able to mark pages as written",
            branches={errno.EOPNOTSUPP: Unsupported, errno.EINVAL: Unsupported},
        )
        native.check(
            native.cdev_attach(attachment.descriptor, page_table),
            f"attach {attachment.target.name} to its page table",
        )
        return page_table

    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        if not self._tracking:
            raise KernelError("dirty pages are not being tracked", hint="dirty_track(True) first")
        merged = bytearray(native.bitmap_bytes(size, page_size))
        for page_table in self._tracking:
            part = native.hwpt_dirty_bitmap(self.iommufd, page_table, iova, size, page_size)
            for index, byte in enumerate(part):
                merged[index] |= byte
        return bytes(merged)

    def _descriptors(self) -> list[int]:
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
