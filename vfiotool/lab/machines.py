"""The machines that a guest can be: QEMU's devices as frozen data, nothing of a run.

Addresses are chosen so that a machine's devices keep theirs whatever the lab adds: the lab's own
devices (channel, 9p shares) are functions of slot 1e on the root bus, a group of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal

from vfiotool.errors import NotFound

Iommu = Literal["intel", "amd", "virtio", "none"]


@dataclass(frozen=True)
class DeviceModel:
    """One `-device`: QEMU's model, its properties in order, and whether QEMU may lack the model."""

    model: str
    properties: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def argument(self) -> str:
        return ",".join([self.model, *(f"{key}={value}" for key, value in self.properties)])


@dataclass(frozen=True)
class VfioUserDevice:
    """A device that a process serves over vfio-user at `socket`; `properties` as a `-device` has
    them."""

    socket: str
    properties: tuple[tuple[str, str], ...] = ()

    def argument(self) -> str:
        # A socket's address can only be told as JSON.
        told: dict[str, object] = {"driver": "vfio-user-pci"}
        told["socket"] = {"type": "unix", "path": self.socket}
        for key, value in self.properties:
            told[key] = {"on": True, "off": False}.get(value, value)
        return json.dumps(told)


@dataclass(frozen=True)
class Disk:
    """A sparse raw file that lives as long as the guest; `id` is the QEMU drive, `options` more of
    its `-drive`, which names the file under `file_option`."""

    id: str
    size_mib: int = 64
    options: tuple[str, ...] = ()
    file_option: str = "file"


@dataclass(frozen=True)
class Machine:
    """A guest's hardware. `load` are modules that the guest loads at start (no udev does),
    `objects` what devices refer to (QEMU's `-object`), `kernel_arguments` further words on its
    kernel's command line. Without `firmware_hotplug` ports and bridges plug by their own
    controllers, on pciehp and shpchp. `served` are devices that processes serve over vfio-user.
    `iommu_bits` is the width of Intel's IOMMU, 39 or 48. The memory is spread over `numa_nodes`."""

    name: str
    summary: str
    devices: tuple[DeviceModel, ...]
    iommu: Iommu = "intel"
    disks: tuple[Disk, ...] = ()
    networks: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    memory_mib: int = 1024
    objects: tuple[str, ...] = ()
    kernel_arguments: tuple[str, ...] = ()
    firmware_hotplug: bool = True
    served: tuple[VfioUserDevice, ...] = ()
    iommu_bits: int | None = None
    numa_nodes: int = 1


def device(model: str, **properties: str) -> DeviceModel:
    """A device model from its properties; one that a machine cannot be without."""
    return DeviceModel(model, tuple(properties.items()))


def root_port(number: int, **properties: str) -> DeviceModel:
    """A PCIe root port `rp<number>` in slot 0x10 + number of the root bus."""
    return device(
        "pcie-root-port",
        id=f"rp{number}",
        bus="pcie.0",
        addr=f"{0x10 + number:#x}",
        chassis=str(number),
        **properties,
    )


EDU = device("edu", bus="pcie.0", addr="0x1")
TESTDEV = device("pci-testdev", bus="pcie.0", addr="0x2", membar="4096")
# What every guest has beside its machine's devices: the channel, and file systems over 9p (which
# Red Hat builds no QEMU with). A guest's own arguments place them.
LAB_DEVICES = tuple(
    DeviceModel(model) for model in ("virtio-serial-pci", "virtserialport", "virtio-9p-pci")
)
# Hotplug tests add their device here with QMP's device_add.
EMPTY_PORT = root_port(9)

NVME_SRIOV = (
    root_port(1),
    device("nvme-subsys", id="subsys0"),
    device(
        "nvme",
        id="nvme0",
        serial="lab-nvme-0",
        bus="rp1",
        subsys="subsys0",
        sriov_max_vfs="4",
        sriov_vq_flexible="8",
        sriov_vi_flexible="4",
        max_ioqpairs="10",
        msix_qsize="6",
    ),
    device("nvme-ns", drive="nvme0", bus="nvme0", nsid="1"),
)
IGB = (
    root_port(2),
    replace(
        device("igb", id="igb0", bus="rp2", netdev="net0", mac="52:54:00:00:02:00"), optional=True
    ),
)
# One slot, two functions: neither is reset without the other where its own reset will not do.
TWO_FUNCTIONS = (
    # At 2.5 GT/s the port does not tell whether its link is up; at more it says that it is not,
    # and Linux gives up waiting for it after a reset.
    root_port(6, **{"x-speed": "2_5"}),
    device(
        "nvme",
        id="nvme5",
        serial="lab-nvme-5",
        bus="rp6",
        addr="0x0.0x0",
        multifunction="on",
        drive="nvme5",
    ),
    device("nvme", id="nvme6", serial="lab-nvme-6", bus="rp6", addr="0x0.0x1", drive="nvme6"),
)
SHARED_GROUP = (
    root_port(4),
    device("pcie-pci-bridge", id="br0", bus="rp4"),
    device("edu", bus="br0", addr="1"),
    device("pci-testdev", bus="br0", addr="2"),
)


def nvme(number: int, *, port: int, serial: str | None = None) -> tuple[DeviceModel, ...]:
    """A plain NVMe disk on a root port, and so in an IOMMU group, of its own."""
    return (
        root_port(port),
        device(
            "nvme",
            id=f"nvme{number}",
            serial=serial or f"lab-nvme-{number}",
            bus=f"rp{port}",
            drive=f"nvme{number}",
        ),
    )


def with_memory_buffer(number: int, *, port: int) -> tuple[DeviceModel, ...]:
    """An NVMe disk with a Controller Memory Buffer of 1 MiB, in BAR 2."""
    around, disk = nvme(number, port=port)
    return (around, replace(disk, properties=(*disk.properties, ("cmb_size_mb", "1"))))


def e1000e(number: int, *, port: int, network: str, mac: str) -> DeviceModel:
    """A network card on a root port, without its boot ROM: not every QEMU package brings one."""
    return device(
        "e1000e",
        id=f"e1000e{number}",
        bus=f"rp{port}",
        netdev=network,
        mac=mac,
        romfile="",
    )


def namespace(controller: str, nsid: int, drive: str, **properties: str) -> DeviceModel:
    return device("nvme-ns", bus=controller, nsid=str(nsid), drive=drive, **properties)


def _odd(number: int, port: int, **properties: str) -> tuple[DeviceModel, ...]:
    """An NVMe controller on a port of its own, without namespaces unless `drive` is given."""
    name = f"odd{number}"
    return (
        root_port(port),
        device("nvme", id=name, serial=f"lab-{name}", bus=f"rp{port}", **properties),
    )


ODD_NVME = (
    *_odd(1, 1),
    namespace("odd1", 1, "meta", ms="8"),
    namespace("odd1", 2, "plain"),
    namespace("odd1", 3, "guarded", ms="8", pi="1"),
    *_odd(2, 2, mqes="31", mdts="1"),
    namespace("odd2", 1, "large", logical_block_size="4096", physical_block_size="4096"),
    *_odd(3, 3),
    *_odd(4, 4),
    namespace(
        "odd4",
        1,
        "zoned",
        **{
            "zoned": "on",
            "zoned.zone_size": "1M",
            "zoned.max_open": "4",
            "zoned.max_active": "4",
        },
    ),
    namespace("odd4", 2, "beside"),
    *_odd(5, 5, max_ioqpairs="2", msix_qsize="3"),
    namespace("odd5", 1, "few1"),
    namespace("odd5", 2, "few2"),
    namespace("odd5", 3, "few3", detached="on"),
    *_odd(6, 6, drive="slow"),
    *_odd(7, 7, drive="bad"),
)


# Reads of block 2048 and writes of block 4096 fail, each for ever. The disk is slow enough that
# commands are out when a reset strikes.
FAILING = (
    "throttling.iops-total=100",
    "file.driver=blkdebug",
    "file.image.driver=file",
    "file.inject-error.0.event=read_aio",
    "file.inject-error.0.sector=2048",
    "file.inject-error.0.errno=5",
    "file.inject-error.1.event=write_aio",
    "file.inject-error.1.sector=4096",
    "file.inject-error.1.errno=28",
)
_ALL = (
    Machine("basic", "edu, pci-testdev and an empty hotplug port", (EDU, TESTDEV, EMPTY_PORT)),
    Machine(
        "sriov",
        "an NVMe disk with 4 VFs, and igb with 7 where QEMU has it",
        (*NVME_SRIOV, *IGB, EMPTY_PORT),
        disks=(Disk("nvme0"),),
        networks=("net0",),
        load=("nvme", "igb"),
    ),
    Machine(
        "shared-group",
        "edu and pci-testdev behind a PCIe-to-PCI bridge: one group",
        (*SHARED_GROUP, EMPTY_PORT),
    ),
    Machine(
        "large",
        "memory for a page of 1 GiB, an edu that reaches 64 bits, an NVMe slot of two functions",
        (
            device("edu", bus="pcie.0", addr="0x1", dma_mask="0xffffffffffffffff"),
            *NVME_SRIOV,
            *TWO_FUNCTIONS,
            EMPTY_PORT,
        ),
        disks=(Disk("nvme0"), Disk("nvme5"), Disk("nvme6")),
        load=("nvme",),
        memory_mib=4096,
        # While it runs no GiB in one piece is to be had.
        kernel_arguments=("hugepagesz=1G", "hugepages=1"),
    ),
    Machine(
        "mdev",
        "the kernel's three sample parents: mtty, mbochs, mdpy",
        (EDU,),
        load=("mtty", "mbochs", "mdpy"),
    ),
    Machine(
        "virtio-iommu",
        "edu and NVMe behind a virtio-iommu, and edu beside it",
        (EDU, *nvme(0, port=1), EMPTY_PORT),
        iommu="virtio",
        disks=(Disk("nvme0"),),
        load=("virtio_iommu", "nvme"),
    ),
    Machine(
        "no-iommu",
        "edu, pci-testdev and NVMe without any IOMMU",
        (EDU, TESTDEV, *nvme(0, port=1), EMPTY_PORT),
        iommu="none",
        disks=(Disk("nvme0"),),
        load=("nvme",),
    ),
    Machine(
        "native-hotplug",
        "edu and pci-testdev behind a bridge, which like the ports has a hotplug controller",
        (EDU, *SHARED_GROUP, EMPTY_PORT),
        firmware_hotplug=False,
    ),
    Machine(
        "storage",
        "five NVMe disks, a group each; the last two are identical but for their serial numbers",
        (
            EDU,
            *nvme(0, port=1),
            *nvme(1, port=2),
            *nvme(2, port=3),
            *nvme(3, port=4, serial="twin-a"),
            *nvme(4, port=5, serial="twin-b"),
            EMPTY_PORT,
        ),
        disks=tuple(Disk(f"nvme{number}", 128) for number in range(5)),
        load=("nvme",),
    ),
    Machine(
        "display",
        "a VGA display that the firmware boots on, and edu",
        # Its slot is named: QEMU's own -vga would take slot 1 before the devices are placed.
        (EDU, device("VGA", bus="pcie.0", addr="0x2"), EMPTY_PORT),
    ),
    Machine(
        "net",
        "igb with VFs where QEMU has it, and two e1000e, on one wire",
        (
            *IGB,
            root_port(3),
            e1000e(0, port=3, network="net1", mac="52:54:00:00:03:00"),
            root_port(5),
            e1000e(1, port=5, network="net2", mac="52:54:00:00:05:00"),
            EMPTY_PORT,
        ),
        networks=("net0", "net1", "net2"),
        load=("igb", "e1000e"),
    ),
    Machine(
        "uses",
        "what hosts use besides disks and networks: USB, CAN, a crypto engine, a card reader, IPMI",
        (
            device("kvaser_pci", id="can0", bus="pcie.0", addr="0x1", canbus="bus0"),
            device("sdhci-pci", id="sdhci0", bus="pcie.0", addr="0x2"),
            device("sd-card", bus="sd-bus", drive="card"),
            device("ipmi-bmc-sim", id="bmc0"),
            device("pci-ipmi-kcs", bmc="bmc0", bus="pcie.0", addr="0x3"),
            root_port(1),
            device("qemu-xhci", id="xhci0", bus="rp1"),
            device("usb-storage", bus="xhci0.0", drive="stick"),
            device("usb-net", bus="xhci0.0", netdev="net2", mac="52:54:00:00:0a:00"),
            *IGB,
            root_port(3),
            e1000e(0, port=3, network="net1", mac="52:54:00:00:03:00"),
            *nvme(0, port=4),
            *nvme(1, port=5),
            root_port(6),
            device("virtio-crypto-pci", bus="rp6", cryptodev="engine0"),
            EMPTY_PORT,
        ),
        disks=(Disk("nvme0"), Disk("nvme1"), Disk("stick"), Disk("card")),
        networks=("net0", "net1", "net2"),
        load=("nvme", "igb", "e1000e", "xhci_pci", "usb_storage", "sd_mod"),
        objects=("can-bus,id=bus0", "cryptodev-backend-builtin,id=engine0"),
    ),
    Machine(
        "odd-nvme",
        "NVMe that is odd: metadata, 4 KiB blocks, none, zoned, few queues, slow, failing",
        (EDU, *ODD_NVME, EMPTY_PORT),
        disks=(
            *(Disk(name, 32) for name in ("meta", "plain", "guarded", "zoned", "beside")),
            *(Disk(name, 32) for name in ("few1", "few2", "few3", "hot")),
            Disk("large", 64),
            Disk("slow", 64, ("throttling.iops-total=60",)),
            Disk("bad", 64, FAILING, "file.image.filename"),
        ),
        load=("nvme",),
    ),
    Machine(
        "memory-buffer",
        "NVMe with a controller memory buffer, and without",
        (*with_memory_buffer(0, port=1), *nvme(1, port=2), EMPTY_PORT),
        disks=(Disk("nvme0"), Disk("nvme1")),
        load=("nvme",),
    ),
    Machine(
        "full",
        "edu, pci-testdev, NVMe with VFs, a second NVMe, igb, a shared group, the mdev samples",
        (
            EDU,
            TESTDEV,
            *NVME_SRIOV,
            *IGB,
            *nvme(1, port=3),
            *SHARED_GROUP,
            EMPTY_PORT,
        ),
        disks=(Disk("nvme0"), Disk("nvme1", 128)),
        networks=("net0",),
        load=("nvme", "igb", "mtty", "mbochs", "mdpy"),
    ),
)
MACHINES = {machine.name: machine for machine in _ALL}
DEFAULT = "basic"


def find(name: str) -> Machine:
    """The machine `name`; raises NotFound, which lists the names."""
    if name not in MACHINES:
        raise NotFound(
            f"no lab machine named {name}; there are {', '.join(MACHINES)}",
            hint="vfiotool lab machines",
        )
    return MACHINES[name]


def iommu_devices(iommu: Iommu, bits: int | None = None) -> tuple[DeviceModel, ...]:
    """The IOMMU as a device, if there is one."""
    if iommu == "intel":
        width = {} if bits is None else {"aw-bits": str(bits)}
        return (device("intel-iommu", intremap="on", **{"caching-mode": "on"}, **width),)
    if iommu == "amd":
        # Left to itself its function takes the first slot that is free so far.
        return (
            device("AMDVI-PCI", id="iommupci", bus="pcie.0", addr="0x1d"),
            device("amd-iommu", intremap="on", **{"dma-remap": "on", "pci-id": "iommupci"}),
        )
    if iommu == "virtio":
        return (device("virtio-iommu-pci", bus="pcie.0", addr="0x1d"),)
    return ()


def iommu_arguments(iommu: Iommu, bits: int | None = None) -> list[str]:
    """QEMU's machine and IOMMU. Interrupt remapping needs the split interrupt controller."""
    result = ["-machine", "q35,kernel-irqchip=split" if iommu in ("intel", "amd") else "q35"]
    for item in iommu_devices(iommu, bits):
        result += ["-device", item.argument()]
    return result


def models_used() -> frozenset[str]:
    """The device models that guests are made of."""
    found = {item.model for machine in MACHINES.values() for item in machine.devices}
    found |= {item.model for item in LAB_DEVICES}
    iommus: tuple[Iommu, ...] = ("intel", "virtio")
    return frozenset(found | {item.model for kind in iommus for item in iommu_devices(kind)})


def arguments(machine: Machine, disk_files: dict[str, str], models: frozenset[str]) -> list[str]:
    """The QEMU arguments of `machine`'s hardware.

    `disk_files` gives the file of each disk by its id; `models` are the device models that this
    QEMU has: an optional device that it lacks is left out.
    """
    result = ["-nodefaults", "-vga", "none", *iommu_arguments(machine.iommu, machine.iommu_bits)]
    if not machine.firmware_hotplug:
        result += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
    for disk in machine.disks:
        file = disk_files[disk.id].replace(",", ",,")
        words = (f"id={disk.id}", f"{disk.file_option}={file}", *disk.options)
        result += ["-drive", f"if=none,format=raw,cache=unsafe,{','.join(words)}"]
    for network in machine.networks:
        result += ["-netdev", f"hubport,id={network},hubid=0"]
    for thing in machine.objects:
        result += ["-object", thing]
    for item in machine.devices:
        if not item.optional or item.model in models:
            result += ["-device", item.argument()]
    return result


def missing_models(machine: Machine, models: frozenset[str]) -> tuple[str, ...]:
    """The optional models of `machine` that this QEMU lacks."""
    return tuple(d.model for d in machine.devices if d.optional and d.model not in models)


def as_json(machine: Machine) -> dict[str, object]:
    return {
        "name": machine.name,
        "summary": machine.summary,
        "iommu": machine.iommu,
        "devices": [item.model for item in machine.devices],
        "memory_mib": machine.memory_mib,
    }
