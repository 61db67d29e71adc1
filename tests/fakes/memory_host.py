"""Hosts held in memory, built function by function, for tests of what reads them."""

from __future__ import annotations

from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

DEVICES = "/sys/devices/pci0000:00"


class HostBuilder:
    """Collects files and links, then gives a Host over them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | int] = {}
        self.links: dict[str, str] = {}
        self.folders: list[str] = ["/sys/bus/pci/devices"]

    def file(self, path: str, content: str | bytes | int) -> HostBuilder:
        self.files[path] = content.encode() if isinstance(content, str) else content
        return self

    def link(self, path: str, target: str) -> HostBuilder:
        self.links[path] = target
        return self

    def function(
        self,
        address: str,
        *,
        ids: str = "8086:10C9",
        class_code: str = "20000",
        driver: str | None = None,
        group: int | None = None,
        attributes: dict[str, str | bytes | int] | None = None,
        links: dict[str, str] | None = None,
    ) -> HostBuilder:
        base = f"{DEVICES}/{address}"
        bound = f"DRIVER={driver}\n" if driver else ""
        self.file(
            f"{base}/uevent",
            f"{bound}PCI_CLASS={class_code}\nPCI_ID={ids}\nPCI_SUBSYS_ID=1AF4:1100\n"
            f"PCI_SLOT_NAME={address}\nMODALIAS=pci:v00008086d000010C9sv00001AF4sd00001100"
            "bc02sc00i00\n",
        )
        for name, content in (attributes or {}).items():
            self.file(f"{base}/{name}", content)
        for name, target in (links or {}).items():
            self.link(f"{base}/{name}", target)
        self.link(f"/sys/bus/pci/devices/{address}", f"../../../devices/pci0000:00/{address}")
        if group is not None:
            self.member(group, address, base)
        return self

    def member(self, group: int, name: str, path: str) -> HostBuilder:
        """A device of any bus at `path` below `/sys/devices`, as a member of a group."""
        up = "../" * (path.count("/") - 1)
        base = f"/sys/kernel/iommu_groups/{group}"
        self.link(f"{path}/iommu_group", f"{up}kernel/iommu_groups/{group}")
        self.link(f"{base}/devices/{name}", f"../../../..{path.removeprefix('/sys')}")
        self.file(f"{base}/type", "DMA\n")
        self.file(f"{base}/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
        return self

    def host(self) -> Host:
        tree = MemoryTree(self.files, self.links, self.folders)
        return Host(tree, live=False, name="test host")
