"""What is done to the fake kernel and to real ones alike, with results and end states compared.

`tests/test_cases.py` runs every case on the fake kernel, `tests/lab/test_cases.py` on a guest's
and on a fake kernel that mirrors it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.change.changing import (
    BEHIND,
    BESIDE,
    BRIDGE,
    EDU,
    NIC,
    NVME,
    TESTDEV,
    UUID,
    Make,
    binding,
    counting,
    creating,
    do,
    releasing,
    removing,
)
from tests.fakes.kernel import PCI
from vfiotool.change.journal import Journal
from vfiotool.change.undo import undo
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host

MTTY = "/sys/class/mdev_bus/mtty/mdev_supported_types"


@dataclass(frozen=True)
class Write:
    """A bare write, as an echo into sysfs: what does the kernel say?"""

    path: str
    data: str


@dataclass(frozen=True)
class Undo:
    """Take back the last change that stands."""


Operation = Make | Write | Undo


def attribute(address: str, name: str) -> str:
    return f"{PCI}/devices/{address}/{name}"


CASES: dict[str, list[Operation]] = {
    "bind a device without driver": [binding(EDU)],
    "bind and release it": [binding(EDU), releasing(EDU)],
    "bind twice": [binding(EDU), binding(EDU)],
    "bind and release a disk": [binding(NVME), releasing(NVME)],
    "bind, undo": [binding(NVME), Undo()],
    "bind, release, undo both": [binding(NVME), releasing(NVME), Undo(), Undo()],
    "undo nothing": [Undo()],
    "several at once": [binding(EDU, TESTDEV, NVME), releasing(TESTDEV, NVME)],
    "park a disk": [binding(NVME, driver="none")],
    "park, probe, release": [
        binding(NVME, driver="none"),
        Write(f"{PCI}/drivers_probe", NVME),
        releasing(NVME),
    ],
    "park, then vfio, then release": [
        binding(NVME, driver="none"),
        binding(NVME),
        releasing(NVME),
    ],
    "a driver that refuses": [binding(EDU, driver="pcieport")],
    "a driver that refuses a disk": [binding(NVME, driver="pcieport")],
    "one of several refuses": [binding(EDU, NVME, driver="nvme")],
    "a whole group": [binding(BEHIND, whole_group=True), releasing(BEHIND, BESIDE)],
    "a bridge": [binding(BRIDGE)],
    "no such device": [binding("0000:77:00.0")],
    "a foreign override is kept when binding fails": [
        Write(attribute(EDU, "driver_override"), "foo\n"),
        binding(EDU, driver="pcieport"),
    ],
    "a foreign unbind is put right": [
        binding(NVME),
        Write(f"{PCI}/drivers/vfio-pci/unbind", NVME),
        binding(NVME),
        releasing(NVME),
    ],
    "undo after a foreign change": [
        binding(NVME),
        Write(f"{PCI}/drivers/vfio-pci/unbind", NVME),
        Undo(),
    ],
    "make VFs that no driver takes": [counting(NIC, 2, False)],
    "make and remove VFs": [counting(NIC, 3), counting(NIC, 0)],
    "from one number of VFs to another": [counting(NIC, 3), counting(NIC, 5)],
    "VFs, undone": [counting(NIC, 4), Undo()],
    "VFs of a disk": [counting(NVME, 2, False), counting(NVME, 4, False), Undo(), Undo()],
    "bind a PF that has VFs": [counting(NIC, 1), binding(NIC)],
    "too many VFs": [counting(NIC, 1000)],
    "VFs of a device that has none": [counting(EDU, 1)],
    "VFs without the driver": [binding(NIC, driver="none"), counting(NIC, 2)],
    "make an mdev": [creating("mtty", "mtty-1")],
    "make an mdev twice": [creating("mtty", "mtty-1"), creating("mtty", "mtty-1")],
    "make and remove an mdev": [creating("mtty", "mtty-2"), removing()],
    "an mdev of every parent, undone": [
        creating("mtty", "mtty-1"),
        creating("mdpy", "mdpy-vga", UUID[:-1] + "2"),
        Undo(),
        Undo(),
    ],
    "an mdev under another type's UUID": [creating("mtty", "mtty-1"), creating("mtty", "mtty-2")],
    "an mdev of no type": [creating("mtty", "mtty-9")],
    "remove no mdev": [removing()],
    "remove an mdev, undone": [creating("mtty", "mtty-1"), removing(), Undo()],
    "writes: unbind what is not bound": [Write(f"{PCI}/drivers/nvme/unbind", EDU)],
    "writes: unbind nothing": [Write(f"{PCI}/drivers/nvme/unbind", "0000:77:00.0")],
    "writes: bind what is bound": [Write(f"{PCI}/drivers/nvme/bind", NVME)],
    "writes: bind to a driver that does not match": [Write(f"{PCI}/drivers/nvme/bind", EDU)],
    "writes: unbind and probe": [
        Write(f"{PCI}/drivers/nvme/unbind", NVME),
        Write(f"{PCI}/drivers_probe", NVME),
    ],
    "writes: probe nothing": [Write(f"{PCI}/drivers_probe", "0000:77:00.0")],
    "writes: probe with an override of no driver": [
        Write(attribute(EDU, "driver_override"), "foo\n"),
        Write(f"{PCI}/drivers_probe", EDU),
        Write(f"{PCI}/drivers/vfio-pci/bind", EDU),
        Write(attribute(EDU, "driver_override"), "\n"),
    ],
    "writes: an endless override": [Write(attribute(EDU, "driver_override"), "x" * 4095)],
    "writes: no such attribute": [Write(attribute(EDU, "nothing"), "1")],
    "writes: too many VFs": [Write(attribute(NIC, "sriov_numvfs"), "1000")],
    "writes: the same number of VFs": [Write(attribute(NIC, "sriov_numvfs"), "0")],
    "writes: from VFs to other VFs": [
        Write(attribute(NIC, "sriov_drivers_autoprobe"), "0"),
        Write(attribute(NIC, "sriov_numvfs"), "2"),
        Write(attribute(NIC, "sriov_numvfs"), "3"),
        Write(attribute(NIC, "sriov_numvfs"), "0"),
        Write(attribute(NIC, "sriov_drivers_autoprobe"), "1"),
    ],
    "writes: autoprobe nonsense": [Write(attribute(NIC, "sriov_drivers_autoprobe"), "x")],
    "writes: an mdev of nonsense": [Write(f"{MTTY}/mtty-1/create", "not-a-uuid")],
    "writes: an mdev twice": [
        Write(f"{MTTY}/mtty-1/create", UUID),
        Write(f"{MTTY}/mtty-1/create", UUID),
        Write(f"/sys/bus/mdev/devices/{UUID}/remove", "0"),
        Write(f"/sys/bus/mdev/devices/{UUID}/remove", "nonsense"),
    ],
}


def run(host: Host, journal: Journal, operations: list[Operation]) -> list[str]:
    """What each operation came to: `done`, or the error's kind and errno."""
    return [_attempt(lambda op=op: _perform(host, journal, op)) for op in operations]  # type: ignore[misc]


def _perform(host: Host, journal: Journal, operation: Operation) -> None:
    if isinstance(operation, Write):
        host.write_attribute(operation.path, operation.data)
    elif isinstance(operation, Undo):
        undo(host, journal)
    else:
        do(host, journal, operation)


def _attempt(act: Callable[[], None]) -> str:
    try:
        act()
    except VfiotoolError as error:
        if "did not take it" in error.message:
            # Each driver's probe has an errno of its own for what is not its device.
            return "refused by the driver"
        return f"{error.kind} {error.errno_name or ''}".strip()
    return "done"
