"""A fake kernel in the likeness of a real one, so that both can be put through the same cases."""

from __future__ import annotations

import errno

from tests.fakes.kernel import PCI, FakeKernel
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import list_addresses, read_identity
from vfiotool.host.host import Host

# samples/vfio-mdev: how many units a parent has, and how many each type takes of them.
SAMPLE_PARENTS: dict[str, tuple[int, dict[str, int]]] = {
    "mtty": (24, {"mtty-1": 1, "mtty-2": 2}),
    "mdpy": (4, {"mdpy-vga": 1, "mdpy-xga": 1, "mdpy-hd": 1}),
    "mbochs": (256, {"mbochs-small": 4, "mbochs-medium": 16, "mbochs-large": 64}),
}


def mirror(host: Host, *, hesitant_nvme: bool = False) -> FakeKernel:
    """A fake kernel with the functions, drivers and mdev parents of a real one."""
    kernel = FakeKernel()
    found = [(name, read_identity(host, name)) for name in list_addresses(host)]
    names = host.listdir(f"{PCI}/drivers")
    for driver in names:
        bound = [one for _, one in found if one is not None and one.driver == driver]
        made = kernel.add_driver(driver, [f"{one.vendor}:{one.device}" for one in bound])
        made.foreign = 0 if is_vfio_driver(driver) or driver == "pci-stub" else errno.EIO
        made.hesitant = driver == "nvme" and hesitant_nvme
    if "igbvf" in kernel.drivers:
        kernel.drivers["igbvf"].ids = frozenset(["8086:10ca"])
    for address, one in found:
        assert one is not None
        base = f"{PCI}/devices/{address}"
        group = host.linkname(f"{base}/iommu_group")
        numbers = {
            name: host.read_int(f"{base}/sriov_{name}") for name in ("totalvfs", "offset", "stride")
        }
        kernel.add_function(
            address,
            f"{one.vendor}:{one.device}",
            class_code=one.class_code or "ff0000",
            driver=one.driver,
            group=None if group is None else int(group),
            total_vfs=numbers["totalvfs"] or 0,
            vf_ids=f"{one.vendor}:{(host.read(f'{base}/sriov_vf_device') or '').zfill(4)}",
            offset=numbers["offset"] or 0,
            stride=numbers["stride"] or 0,
            net=_interface(host, base),
        )
        if one.driver is not None and one.driver not in ("igb", "nvme"):
            kernel.drivers[one.driver].sriov = False
        override = host.read(f"{base}/driver_override")
        kernel._put(f"/sys/devices/pci0000:00/{address}/driver_override", f"{override}\n".encode())
    for parent in host.listdir("/sys/class/mdev_bus"):
        if parent in SAMPLE_PARENTS:
            kernel.add_parent(parent, *SAMPLE_PARENTS[parent])
    return kernel


def _interface(host: Host, base: str) -> int | None:
    """The number of its first interface: a network function that shows none counts as unseen."""
    for name in host.listdir(f"{base}/net"):
        return host.read_int(f"{base}/net/{name}/ifindex")
    return None
