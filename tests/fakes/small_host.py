"""A builder of hosts in memory for the tests of usage, verdict and doctor."""

from __future__ import annotations

from collections.abc import Iterable

from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

ROOT_BUS = "/sys/devices/pci0000:00"


class SmallHost:
    """Add what the test is about, then take `host()`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | int] = {}
        self.links: dict[str, str] = {}
        self.folders: set[str] = set()

    def host(self, *, live: bool = False) -> Host:
        return Host(MemoryTree(self.files, self.links, self.folders), live=live, name="small")

    def file(self, path: str, text: str) -> None:
        self.files[path] = f"{text}\n".encode()

    def link(self, path: str, target: str) -> None:
        """A link as sysfs has them: given absolute, stored relative."""
        ups = "../" * (path.count("/") - 1)
        self.links[path] = ups + target.removeprefix("/")

    def function(
        self,
        address: str,
        *,
        under: Iterable[str] = (),
        identity: str = "1234:11e8",
        class_code: str = "00ff00",
        driver: str | None = None,
        group: int | None = None,
        config: bytes | None = None,
    ) -> str:
        """A PCI function below the ports `under`; its path."""
        path = "/".join([ROOT_BUS, *under, address])
        lines = [f"PCI_CLASS={class_code.upper()}", f"PCI_ID={identity.upper()}"]
        if driver is not None:
            lines.insert(0, f"DRIVER={driver}")
            self.link(f"{path}/driver", f"/sys/bus/pci/drivers/{driver}")
            self.folders.add(f"/sys/bus/pci/drivers/{driver}")
        self.file(f"{path}/uevent", "\n".join(lines))
        self.link(f"/sys/bus/pci/devices/{address}", path)
        if group is not None:
            self.member(group, address, path)
        if config is not None:
            self.files[f"{path}/config"] = config
        return path

    def member(self, group: int, name: str, path: str) -> None:
        base = f"/sys/kernel/iommu_groups/{group}"
        self.link(f"{base}/devices/{name}", path)
        self.link(f"{path}/iommu_group", base)
        self.file(f"{base}/type", "DMA")
        self.file(f"{base}/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi")
        self.folders.add("/sys/class/iommu/dmar0")

    def block(self, name: str, path: str, number: str, *, holders: Iterable[str] = ()) -> None:
        """A block device at `path`; its holders are added as virtual devices are, by `block`."""
        self.link(f"/sys/class/block/{name}", path)
        self.file(f"{path}/dev", number)
        self.folders.add(f"{path}/holders")
        for holder in holders:
            self.link(f"{path}/holders/{holder}", f"/sys/devices/virtual/block/{holder}")

    def nvme(self, address: str, disk: str, number: str, *, group: int | None = None) -> str:
        """An NVMe function with one namespace; the function's path."""
        path = self.function(
            address, identity="1b36:0010", class_code="010802", driver="nvme", group=group
        )
        self.block(disk, f"{path}/nvme/{disk[:-2]}/{disk}", number)
        return path

    def mounts(self, *lines: str) -> None:
        self.file("/proc/vfiotool/mounts", "\n".join(lines))

    def network(self, address: str, name: str, *, driver: str = "e1000e") -> str:
        """A network function with one interface; the interface's path."""
        path = self.function(
            address,
            identity="8086:10d3",
            class_code="020000",
            driver=driver,
            group=int(address[5:7]),
        )
        self.link(f"/sys/class/net/{name}", f"{path}/net/{name}")
        self.file(f"{path}/net/{name}/uevent", f"INTERFACE={name}")
        self.file("/proc/vfiotool/addresses", "lo\t127.0.0.1/8")
        return f"{path}/net/{name}"

    def virtual_interface(self, name: str, kind: str, *lowers: str) -> str:
        """A bridge, bond, VLAN … over other interfaces; its path."""
        path = f"/sys/devices/virtual/net/{name}"
        self.link(f"/sys/class/net/{name}", path)
        self.file(f"{path}/uevent", f"DEVTYPE={kind}\nINTERFACE={name}")
        for lower in lowers:
            self.link(f"{lower}/upper_{name}", path)
        return path

    def addresses(self, *pairs: tuple[str, str]) -> None:
        self.file("/proc/vfiotool/addresses", "\n".join(f"{a}\t{b}" for a, b in pairs))
