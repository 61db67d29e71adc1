"""An address space over a VFIO container and groups (type1, version 2).

Source: Documentation/driver-api/vfio.rst, <linux/vfio.h>. No-IOMMU groups use the same container
with another IOMMU model and cannot map anything.
"""

from __future__ import annotations

import errno
from typing import NoReturn

from vfiotool.errors import KernelError, Refused, Unsupported
from vfiotool.host.host import Host
from vfiotool.native import library as native
from vfiotool.vfio.backend import (
    ALL_ADDRESSES,
    CONTAINER_NODE,
    GROUP_VIABLE,
    AddressSpace,
    Attachment,
    map_failure,
    open_failure,
)
from vfiotool.vfio.caps import Type1Info, parse_type1
from vfiotool.vfio.target import Target, not_on_vfio

_TYPE1V2 = 3
_NOIOMMU = 8
_UNMAP_ALL = 9


class Type1Space(AddressSpace):
    """A container; the groups of the devices attached to it join it and leave with the last."""

    name = "type1"

    def __init__(self, host: Host, *, noiommu: bool = False) -> None:
        super().__init__(host)
        self.noiommu = noiommu
        if noiommu:
            self.name = "noiommu"
        result = native.open_node(CONTAINER_NODE)
        if result < 0:
            self.closed = True
            raise open_failure(result, CONTAINER_NODE, "a container")
        self.container = result
        self._aim(result, None)
        self._model_set = False
        self._groups: dict[str, tuple[int, int]] = {}
        try:
            self._check_container()
        except BaseException:
            self.close()
            raise

    def _check_container(self) -> None:
        version = native.container_version(self.container)
        model = _NOIOMMU if self.noiommu else _TYPE1V2
        if version != 0 or not native.container_check(self.container, model):
            raise Unsupported(
                f"the kernel's VFIO (API version {version}) has no "
                f"{'no-IOMMU' if self.noiommu else 'type1 v2'} model",
                hint="modprobe vfio enable_unsafe_noiommu_mode=1"
                if self.noiommu
                else "modprobe vfio_iommu_type1",
            )

    def attach(self, target: Target, vf_token: str | None = None) -> Attachment:
        self.refuse_closed()
        if target.group_node is None or target.group is None:
            raise not_on_vfio(target)
        group = self._join(target, target.group, target.group_node)
        name = target.name if vf_token is None else f"{target.name} vf_token={vf_token}"
        descriptor = native.group_device(group, name)
        if descriptor < 0:
            self._leave(target.group)
            raise self._device_failure(descriptor, target)
        attachment = Attachment(target, descriptor, group)
        self.attachments.append(attachment)
        return attachment

    def _device_failure(self, number: int, target: Target) -> Exception:
        if number in (-errno.ENODEV, -errno.EINVAL):
            return not_on_vfio(target)
        failure = native.failed(number, f"open {target.name}", device=target.name)
        if failure.errno_name == "EACCES":
            failure.hint = "a VF whose PF is driven from user space needs its token: --vf-token"
        elif failure.errno_name == "EBUSY":
            failure.hint = "it is open elsewhere: end that program first"
        return failure

    def _join(self, target: Target, number: str, node: str) -> int:
        if number in self._groups:
            group, users = self._groups[number]
            self._groups[number] = (group, users + 1)
            return group
        group = native.open_node(node)
        if group < 0:
            raise open_failure(group, node, target.name)
        try:
            if not native.group_flags(group) & GROUP_VIABLE:
                raise Refused(
                    f"group {number} is not viable: a member is still on a host driver",
                    hint=f"vfiotool why {target.name}",
                    device=target.name,
                )
            result = native.group_set_container(group, self.container)
            native.check(result, f"put group {number} into the container", device=target.name)
            if not self._model_set:
                self._set_model(number, target.name)
        except BaseException:
            native.close(group)
            raise
        self._groups[number] = (group, 1)
        return group

    def _set_model(self, number: str, device: str) -> None:
        result = native.container_set_iommu(self.container, _NOIOMMU if self.noiommu else _TYPE1V2)
        native.check(
            result,
            f"set the IOMMU model for group {number}",
            device=device,
            hint="interrupt remapping may be missing (dmesg tells): vfiotool doctor",
        )
        self._model_set = True

    def _leave(self, number: str) -> None:
        group, users = self._groups[number]
        if users > 1:
            self._groups[number] = (group, users - 1)
            return
        del self._groups[number]
        native.group_unset_container(group)
        native.close(group)
        if not self._groups:
            # The last group took the IOMMU model and all mappings with it.
            self._model_set = False

    def detach(self, attachment: Attachment) -> None:
        if attachment not in self.attachments:
            return
        self.attachments.remove(attachment)
        native.close(attachment.descriptor)
        if attachment.target.group is not None:
            self._leave(attachment.target.group)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        self.refuse_closed()
        raise map_failure(result, address, iova, size, self.host, per_user=False)

    def _unmap_failed(self, result: int, iova: int, size: int) -> NoReturn:
        self.refuse_closed()
        operation = f"unmap {size} bytes at I/O address {iova:#x}"
        if result == -errno.EINVAL:
            raise KernelError(f"{operation}: it would cut a mapping in two", errno_name="EINVAL")
        raise native.failed(result, operation)

    def unmap_all(self) -> int:
        if native.container_check(self.container, _UNMAP_ALL):
            return native.check(native.type1_unmap_all(self.container), "unmap all")
        half = 1 << 63
        return self.unmap(0, half) + self.unmap(half, half)

    def info(self) -> Type1Info:
        """What VFIO_IOMMU_GET_INFO tells; needs a device in the container."""
        return parse_type1(native.type1_info(self.container))

    def ranges(self) -> tuple[tuple[int, int], ...]:
        if not self._model_set or self.noiommu:
            return ALL_ADDRESSES
        # Absent where only mdevs are in the container: then nothing restricts the addresses.
        ranges = self.info().ranges
        return ALL_ADDRESSES if ranges is None else ranges

    def page_sizes(self) -> int:
        return self.info().page_sizes if self._model_set and not self.noiommu else 4096

    def dirty_track(self, start: bool) -> None:
        native.check(
            native.type1_dirty_track(self.container, start),
            f"{'start' if start else 'stop'} tracking dirty pages",
            branches={errno.ENOTTY: Unsupported, errno.EINVAL: Unsupported},
        )

    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        return native.type1_dirty_bitmap(self.container, iova, size, page_size)

    def _descriptors(self) -> list[int]:
        return [*(group for group, _ in self._groups.values()), self.container]
