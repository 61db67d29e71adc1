"""A laid-out host of any size: a directory that `vfiotool --root` and `lspci -O` can both read.

    python -m tests.bench.bighost FOLDER 4096 [--distinct]

A unit of 64 functions is a root port, a network function and its 62 VFs; every eighth unit has a
PCIe-to-PCI bridge with conventional functions that all share the bridge's group instead. Each
function has the attributes, links and configuration space (4096 bytes) that a real one has.
With `--distinct` no two functions have the same configuration space.
Equal contents are one file with many names, which readers cannot tell and which saves memory.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

from tests.fakes.config_space import Extended, Standard, build

UNIT = 64
# Buses from 80h on are those behind conventional bridges.
UNITS_A_DOMAIN = 120
_DRIVERS = ("vfio-pci", "iavf", None)
_AER = bytes(40)
_LINK = struct.pack("<IHH", 0x0040_0404 | 16 << 4, 0x0040, 0x1004 | 16 << 4)
_MSIX = struct.pack("<HII", 0x8007, 0x00000003, 0x00001003)


class Layout:
    """Writes files and links below a root; equal contents become hard links of one file."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._known: dict[bytes, str] = {}
        self._folders: set[str] = set()

    def folder(self, path: str) -> None:
        if path not in self._folders:
            os.makedirs(self.root + path, exist_ok=True)
            self._folders.add(path)

    def file(self, path: str, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        whole = self.root + path
        first = self._known.get(data)
        if first is not None:
            try:
                os.link(first, whole)
                return
            except OSError as error:
                # ext4 allows 65,000 names a file.
                if error.errno != errno.EMLINK:
                    raise
        with open(whole, "wb") as target:
            target.write(data)
        self._known[data] = whole

    def link(self, path: str, target: str) -> None:
        os.symlink(target, self.root + path)


class HostMaker:
    """Lays functions out, one group a function unless told otherwise."""

    def __init__(self, root: Path, *, distinct: bool = False) -> None:
        self.out = Layout(root)
        self.distinct = distinct
        self.groups = 0
        self.functions = 0
        for path in (
            "/sys/bus/pci/devices",
            "/sys/bus/pci/slots",
            "/sys/kernel/iommu_groups",
            "/sys/class/iommu",
            "/proc/sys/kernel/random",
        ):
            self.out.folder(path)
        self.out.file("/proc/sys/kernel/random/boot_id", "3f1c2a7e-0000-4000-8000-000000000001\n")
        for driver in ("pcieport", "ice", "iavf", "vfio-pci", "e1000"):
            self.out.folder(f"/sys/bus/pci/drivers/{driver}")

    def group(self) -> int:
        number = self.groups
        self.groups += 1
        base = f"/sys/kernel/iommu_groups/{number}"
        self.out.folder(f"{base}/devices")
        self.out.file(f"{base}/type", "DMA-FQ\n")
        self.out.file(f"{base}/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
        return number

    def function(
        self,
        path: str,
        *,
        ids: tuple[int, int],
        class_code: int,
        driver: str | None,
        group: int,
        config: bytearray,
        attributes: dict[str, str] | None = None,
        links: dict[str, str] | None = None,
    ) -> None:
        """One function below `/sys/devices`, its bus entry and its place in its group."""
        address = path.rpartition("/")[2]
        up = "../" * (path.count("/") - 1)
        vendor, device = ids
        out = self.out
        out.folder(path)
        identity = f"v{vendor:08X}d{device:08X}sv00008086sd00000000"
        code = f"bc{class_code >> 16:02X}sc{class_code >> 8 & 255:02X}i{class_code & 255:02X}"
        modalias = f"pci:{identity}{code}"
        bound = "" if driver is None else f"DRIVER={driver}\n"
        files = {
            "uevent": f"{bound}PCI_CLASS={class_code:X}\nPCI_ID={vendor:04X}:{device:04X}\n"
            f"PCI_SUBSYS_ID=8086:0000\nPCI_SLOT_NAME={address}\nMODALIAS={modalias}\n",
            "vendor": f"{vendor:#06x}\n",
            "device": f"{device:#06x}\n",
            "subsystem_vendor": "0x8086\n",
            "subsystem_device": "0x0000\n",
            "class": f"{class_code:#08x}\n",
            "revision": "0x02\n",
            "irq": "0\n",
            "numa_node": "0\n",
            "driver_override": "(null)\n",
            "modalias": f"{modalias}\n",
            "power_state": "D0\n",
            "d3cold_allowed": "1\n",
            "enable": "1\n",
            "msi_bus": "1\n",
            "local_cpus": "ffffffff\n",
            "local_cpulist": "0-31\n",
            "dma_mask_bits": "64\n",
            "consistent_dma_mask_bits": "64\n",
            "ari_enabled": "1\n",
            "broken_parity_status": "0\n",
            "reset_method": "flr\n",
            "current_link_speed": "16.0 GT/s PCIe\n",
            "current_link_width": "16\n",
            "max_link_speed": "16.0 GT/s PCIe\n",
            "max_link_width": "16\n",
            "resource": _resource(self.functions),
            **(attributes or {}),
        }
        for name, content in files.items():
            out.file(f"{path}/{name}", content)
        if self.distinct:
            # Latency timer, interrupt line, and a register of the first capability.
            config[0x0D], config[0x3C] = self.functions & 0xF8, self.functions >> 8
            config[0x42] = config[0x42] & 0xF8 | self.functions & 7
        out.file(f"{path}/config", bytes(config))
        if driver is not None:
            out.link(f"{path}/driver", f"{up}bus/pci/drivers/{driver}")
        out.link(f"{path}/subsystem", f"{up}bus/pci")
        out.link(f"{path}/iommu_group", f"{up}kernel/iommu_groups/{group}")
        out.link(f"{path}/iommu", f"{up}devices/virtual/iommu/dmar0")
        for name, target in (links or {}).items():
            out.link(f"{path}/{name}", target)
        out.link(f"/sys/bus/pci/devices/{address}", f"../../..{path.removeprefix('/sys')}")
        out.link(
            f"/sys/kernel/iommu_groups/{group}/devices/{address}",
            f"../../../..{path.removeprefix('/sys')}",
        )
        self.functions += 1


def _resource(number: int) -> str:
    start = 0x4000000000 + number * 0x20000
    unset = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    bar = f"{start:#018x} {start + 0x1FFFF:#018x} 0x000000000014220c\n"
    return bar + unset * 12


def _express(kind: int) -> Standard:
    device = struct.pack("<IHH", 0x10008FE2, 0x2936, 0)
    tail = struct.pack("<IHHIHHIHH", 0, 0, 0, 0, 0, 0, 0x0070_0BFF, 0, 0)
    tail += struct.pack("<IHHIHH", 0x1E, 0x0004, 0x001E, 0, 0, 0)
    return (0x10, struct.pack("<H", 0x0002 | kind << 4) + device + _LINK + tail)


def _pf_config(number: int, vfs: int) -> bytearray:
    serial = struct.pack("<Q", 0x40A6B7FFFF000000 + number)
    sriov = struct.pack("<IHHHHHBxHHxxHII", 0, 0x19, 0, vfs, vfs, vfs, 0, 1, 1, 0x1889, 0x553, 1)
    standard: list[Standard] = [
        (0x01, struct.pack("<HHH", 0x0003, 0x0008, 0)),
        (0x05, struct.pack("<HIIHHII", 0x0180, 0xFEE00000 + number, 0, number & 0xFFFF, 0, 0, 0)),
        (0x11, _MSIX),
        _express(0),
    ]
    extended: list[Extended] = [
        (0x0001, 2, _AER),
        (0x000E, 1, bytes(4)),
        (0x0003, 1, serial),
        (0x0010, 1, sriov + bytes(28)),
        (0x0017, 1, bytes(8)),
        (0x000D, 1, bytes(4)),
        (0x001B, 1, struct.pack("<HH", 0x1404, 0)),
        (0x0013, 1, bytes(12)),
        (0x0018, 1, bytes(4)),
        (0x0025, 1, bytes(8)),
        (0x0026, 1, bytes(28)),
    ]
    return build(standard, extended, device=0x1592)


def _vf_config(driver: str | None) -> bytearray:
    standard: list[Standard] = [(0x11, _MSIX), _express(0)]
    extended: list[Extended] = [
        (0x0001, 2, _AER),
        (0x000E, 1, bytes(4)),
        (0x0017, 1, bytes(8)),
        (0x000D, 1, bytes(4)),
    ]
    data = build(standard, extended, vendor=0xFFFF, device=0xFFFF)
    # A driver turns its function's bus mastering on, and vfio-pci waits for a user to do so.
    data[4] = {"iavf": 0x04, "vfio-pci": 0x00, None: 0x00}[driver]
    if driver is None:
        data[0x43] &= 0x7F
    return data


def _port_config(number: int) -> bytearray:
    standard: list[Standard] = [
        (0x01, struct.pack("<HHH", 0xC803, 0x0008, 0)),
        (0x05, struct.pack("<HIHHII", 0x0103, 0xFEE00000 + number, number & 0xFFFF, 0, 3, 0)),
        _express(4),
        (0x0D, struct.pack("<HHH", 0, 0x8086, 0x0000)),
    ]
    extended: list[Extended] = [
        (0x0001, 1, bytes(52)),
        (0x000D, 1, struct.pack("<HH", 0x001F, 0x001D)),
        (0x0019, 1, bytes(24)),
        (0x0025, 1, bytes(8)),
    ]
    return build(standard, extended, device=0x347A, class_code=0x060400, bridge=True)


def _conventional_config(number: int) -> bytearray:
    standard: list[Standard] = [
        (0x01, struct.pack("<HHH", 0x0002, 0, 0)),
        (0x05, struct.pack("<HIIH", 0x0080, 0xFEE00000, 0, number & 0xFFFF)),
    ]
    return build(standard, device=0x100E, size=256)


def _lay_unit(maker: HostMaker, unit: int) -> None:
    domain, bus = divmod(unit, UNITS_A_DOMAIN)
    bus = bus + 1
    root = f"/sys/devices/pci{domain:04x}:00"
    port = f"{root}/{domain:04x}:00:{bus >> 3:02x}.{bus & 7}"
    maker.function(
        port,
        ids=(0x8086, 0x347A),
        class_code=0x060400,
        driver="pcieport",
        group=maker.group(),
        config=_port_config(unit),
    )
    if unit % 8 == 7:
        _lay_conventional(maker, port, domain, bus)
    else:
        _lay_network(maker, port, domain, bus, unit)


def _lay_network(maker: HostMaker, port: str, domain: int, bus: int, unit: int) -> None:
    vfs = UNIT - 2
    names = [f"{domain:04x}:{bus:02x}:{slot >> 3:02x}.{slot & 7}" for slot in range(UNIT - 1)]
    maker.function(
        f"{port}/{names[0]}",
        ids=(0x8086, 0x1592),
        class_code=0x020000,
        driver="ice",
        group=maker.group(),
        config=_pf_config(unit, vfs),
        attributes={
            "sriov_totalvfs": f"{vfs}\n",
            "sriov_numvfs": f"{vfs}\n",
            "sriov_drivers_autoprobe": "1\n",
            "sriov_stride": "1\n",
            "sriov_offset": "1\n",
            "sriov_vf_device": "1889\n",
        },
        links={f"virtfn{index}": f"../{names[index + 1]}" for index in range(vfs)},
    )
    for index in range(vfs):
        maker.function(
            f"{port}/{names[index + 1]}",
            ids=(0x8086, 0x1889),
            class_code=0x020000,
            driver=_DRIVERS[index % len(_DRIVERS)],
            group=maker.group(),
            config=_vf_config(_DRIVERS[index % len(_DRIVERS)]),
            links={"physfn": f"../{names[0]}"},
        )


def _lay_conventional(maker: HostMaker, port: str, domain: int, bus: int) -> None:
    """Functions behind a bridge without ACS: one group for them all."""
    group = maker.group()
    bridge = f"{port}/{domain:04x}:{bus:02x}:00.0"
    maker.function(
        bridge,
        ids=(0x1B36, 0x000E),
        class_code=0x060400,
        driver=None,
        group=group,
        config=_port_config(bus),
    )
    for slot in range(UNIT - 2):
        maker.function(
            f"{bridge}/{domain:04x}:{bus + 128:02x}:{slot >> 3:02x}.{slot & 7}",
            ids=(0x8086, 0x100E),
            class_code=0x020000,
            driver="e1000" if slot % 4 == 0 else None,
            group=group,
            config=_conventional_config(slot),
        )


def lay_out(root: Path, functions: int, *, distinct: bool = False) -> HostMaker:
    """Lay a host of `functions` functions (a multiple of 64) out below `root`."""
    assert functions % UNIT == 0, f"a multiple of {UNIT}"
    root.mkdir(parents=True, exist_ok=True)
    maker = HostMaker(root, distinct=distinct)
    for unit in range(functions // UNIT):
        _lay_unit(maker, unit)
    return maker


if __name__ == "__main__":
    made = lay_out(Path(sys.argv[1]), int(sys.argv[2]), distinct="--distinct" in sys.argv)
    print(f"{made.functions} functions in {made.groups} groups")
