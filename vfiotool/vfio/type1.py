"""An address space over a VFIO container and groups (type1, version 2).

Source: Documentation/driver-api/vfio.rst, <linux/vfio.h>. No-IOMMU groups use the same container
with another IOMMU model and cannot map anything.
"""

from __future__ import annotations

import errno
from typing import NoReturn

from vfiotool.errors import Refused, Unsupported
from vfiotool.host.host import Host
from vfiotool.native import library as native
from vfiotool.vfio.caps import Type1Info, parse_type1
from vfiotool.vfio.space import (
    ALL_ADDRESSES,
    CONTAINER_NODE,
    GROUP_VIABLE,
    AddressSpace,
    Attachment,
    file_of,
    let_go,
    map_failure,
    open_failure,
)
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
        self.container = file_of(result, "the address space")
        self._aim(self.container, None)
        self._model_set = False
        self._groups: dict[str, tuple[int, int]] = {}
        try:
            self._check_container()
        except BaseException:
            self.close()
            raise

    def _check_container(self) -> None:
        model = _NOIOMMU if self.noiommu else _TYPE1V2
        with self.container as fd:
            version = native.container_version(fd)
            known = native.container_check(fd, model)
        if version != 0 or not known:
            raise Unsupported(
                f"the kernel's VFIO (API version {version}) has no "
                f"{'no-IOMMU' if self.noiommu else 'type1 v2'} model",
                hint="modprobe vfio enable_unsafe_noiommu_mode=1"
                if self.noiommu
                else "modprobe vfio_iommu_type1",
            )

    def _attach(self, target: Target, vf_token: str | None) -> Attachment:
        if target.group_node is None or target.group is None:
            raise not_on_vfio(target)
        group = self._join(target, target.group, target.group_node)
        name = target.name if vf_token is None else f"{target.name} vf_token={vf_token}"
        descriptor = native.group_device(group, name)
        if descriptor < 0:
            self._leave(target.group)
            raise self._device_failure(descriptor, target)
        return Attachment(target, file_of(descriptor, target.name), group)

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
            with self.container as fd:
                result = native.group_set_container(group, fd)
            native.check(result, f"put group {number} into the container", device=target.name)
            if not self._model_set:
                self._set_model(number, target.name)
        except BaseException:
            native.close(group)
            raise
        self._groups[number] = (group, 1)
        return group

    def _set_model(self, number: str, device: str) -> None:
        with self.container as fd:
            result = native.container_set_iommu(fd, _NOIOMMU if self.noiommu else _TYPE1V2)
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

    def _detach(self, attachment: Attachment) -> None:
        let_go(attachment.handle)
        if attachment.target.group is not None:
            self._leave(attachment.target.group)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        self.refuse_closed()
        raise map_failure(result, address, iova, size, self.host, per_user=False)

    def _cuts(self, result: int, iova: int, size: int) -> bool:
        return result == -errno.EINVAL

    def unmap_all(self) -> int:
        with self.container as fd:
            at_once = native.container_check(fd, _UNMAP_ALL)
        if at_once:
            return native.check(self._unmap_all(), "unmap all")
        half = 1 << 63
        return self.unmap(0, half) + self.unmap(half, half)

    def info(self) -> Type1Info:
        """What VFIO_IOMMU_GET_INFO tells; needs a device in the container."""
        with self.container as fd:
            return parse_type1(native.type1_info(fd))

    def ranges(self) -> tuple[tuple[int, int], ...]:
        if not self._model_set or self.noiommu:
            return ALL_ADDRESSES
        # Absent where only mdevs are in the container: then nothing restricts the addresses.
        ranges = self.info().ranges
        return ALL_ADDRESSES if ranges is None else ranges

    def page_sizes(self) -> int:
        return self.info().page_sizes if self._model_set and not self.noiommu else 4096

    def dirty_track(self, start: bool) -> None:
        with self.container as fd:
            result = native.type1_dirty_track(fd, start)
        native.check(
            result,
            f"{'start' if start else 'stop'} tracking dirty pages",
            branches={errno.ENOTTY: Unsupported, errno.EINVAL: Unsupported},
        )

    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        with self.container as fd:
            return native.type1_dirty_bitmap(fd, iova, size, page_size)

    def _handles(self) -> list[native.Handle]:
        return [self.container]
