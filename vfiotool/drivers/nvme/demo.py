"""The NVMe driver's self-test, and its registers for `device dump`."""

from __future__ import annotations

from collections.abc import Iterator

from vfiotool.drivers import Check, DeviceId
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.vfio import Device

DRIVES = {"nvme": (DeviceId(class_code=nvme_spec.CLASS_CODE),)}


def demo(device: Device) -> Iterator[Check]:
    """Identify, read the first blocks polled and by interrupt, compare; nothing is written."""
    with Controller(device) as controller:
        yield from _checks(controller)


def _checks(controller: Controller) -> Iterator[Check]:
    identity = controller.identity
    named = f"{identity.model} {identity.serial}, firmware {identity.firmware}"
    yield Check("identify", bool(identity.model), named)
    nsids = controller.namespaces()
    yield Check("namespaces", True, f"{nsids or 'none'}, {controller.queue_limit} queue pairs")
    disk = _first(controller, nsids)
    if disk is None:
        yield Check("read", True, "left out: no namespace with plain blocks")
        return
    queue = controller.create_queue()
    count = min(disk.blocks, 64)
    polled = queue.read(disk, 0, count)
    size = f"{disk.blocks} blocks of {disk.block_bytes}"
    yield Check("read", len(polled) == count * disk.block_bytes, f"{len(polled)} bytes of {size}")
    controller.enable_interrupts(2)
    signalled = controller.create_queue(vector=1)
    same = signalled.read(disk, 0, count) == polled
    yield Check("interrupt", same, f"{len(polled)} bytes by MSI-X, equal: {same}")
    last = queue.read(disk, disk.blocks - 1, 1)
    yield Check("last block", len(last) == disk.block_bytes, f"{len(last)} bytes")


def _first(controller: Controller, nsids: list[int]) -> Namespace | None:
    for nsid in nsids:
        disk = controller.namespace(nsid)
        if not disk.metadata_bytes:
            return disk
    return None


def registers_of(device: Device) -> nvme_spec.NvmeRegisters:
    """The controller's registers, for `device dump`."""
    return nvme_spec.NvmeRegisters(device.region(0).access())
