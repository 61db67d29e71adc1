"""What steps compare and restore: a device's identity, its binding, its VFs and mdevs.

Every reader here can meet a device whose lock a stuck change holds: attributes that the kernel
shows under the device lock (`driver_override`, `sriov_numvfs`) are read with a deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import read_identity
from vfiotool.devices.serial import read_serial_number
from vfiotool.errors import NotFound, Stuck
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV_VFIO,
    PROC,
    SYS_MDEV_DEVICES,
    SYS_PCI_DEVICES,
    SYS_PCI_DRIVERS,
    SYS_PCI_PROBE,
    SYS_VDPA_DEVICES,
    SYS_VDPA_DRIVERS,
    SYS_VDPA_PROBE,
)

# A binding whose driver is "whatever the kernel takes": the goal of a release without a record.
ANY = "*"
# An override that no driver matches, so that no probe takes a parked device (as driverctl does).
PARKED = "none"

# PCI Local Bus 3.0, appendix H.
_CAP_MSIX = 0x11


@dataclass(frozen=True, slots=True)
class Bus:
    """Where a bus shows its devices and drivers and takes requests to probe."""

    devices: str
    drivers: str
    probe: str


BUSES = {
    "pci": Bus(SYS_PCI_DEVICES, SYS_PCI_DRIVERS, SYS_PCI_PROBE),
    "vdpa": Bus(SYS_VDPA_DEVICES, SYS_VDPA_DRIVERS, SYS_VDPA_PROBE),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What must still hold of an address before it is written to: addresses are reused.

    None means that the host did not tell when the plan was made; it is then not compared.
    """

    vendor: str | None = None
    device: str | None = None
    subsystem_vendor: str | None = None
    subsystem_device: str | None = None
    serial: str | None = None

    def differs_from(self, other: Identity) -> str | None:
        """The first fact known to both that differs, as text, or None."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                return f"{name} {theirs} instead of {mine}"
        return None


UNKNOWN = Identity()


@dataclass(frozen=True, slots=True)
class Binding:
    """A device's driver and override; None for none. `driver` may be ANY as a goal."""

    driver: str | None
    override: str | None

    @property
    def taken(self) -> bool:
        """Whether the device is away from its usual driver on purpose."""
        on_vfio = self.driver is not None and self.driver != ANY and is_vfio_driver(self.driver)
        return on_vfio or self.override is not None

    def __str__(self) -> str:
        if self.driver == ANY:
            return "the kernel's choice"
        return self.driver or ("parked" if self.override == PARKED else "no driver")


def device_exists(host: Host, bus: str, name: str) -> bool:
    return host.exists(f"{BUSES[bus].devices}/{name}")


def read_binding(host: Host, bus: str, name: str) -> Binding:
    """The binding now. Raises NotFound if the device is gone, Stuck if its lock is held."""
    base = f"{BUSES[bus].devices}/{name}"
    path = f"{base}/driver_override"
    override = read_locked(host, name, path)
    # An override that is there now was not when it was read: the device went and came back.
    if override is None and (not host.exists(base) or host.exists(path)):
        raise gone(name)
    driver = host.linkname(f"{base}/driver")
    return Binding(driver, None if override in (None, "", "(null)") else override)


def read_locked(host: Host, name: str, path: str) -> str | None:
    """An attribute of device `name`, None if it has none. Raises Stuck if its lock is held."""
    try:
        return host.read_locked(path)
    except Stuck as error:
        raise Stuck(
            f"{name}: reading its {path.rpartition('/')[2]} gave no answer: the device is locked",
            hint="end what holds the device, then: vfiotool recover",
            device=name,
        ) from error


def read_driver(host: Host, bus: str, name: str) -> str | None:
    """A device's driver now: a link, which takes no lock to read. Raises NotFound."""
    base = f"{BUSES[bus].devices}/{name}"
    driver = host.linkname(f"{base}/driver")
    if driver is None and not host.exists(base):
        raise gone(name)
    return driver


def gone(name: str) -> NotFound:
    return NotFound(
        f"{name} is not there (any more)", hint="vfiotool devices lists what is", device=name
    )


def read_pci_identity(host: Host, address: str) -> Identity:
    """Ids and serial number of the function at an address. Raises NotFound, and Stuck while its
    configuration space gives no answer."""
    found = read_identity(host, address)
    if found is None:
        raise gone(address)
    try:
        serial = read_serial_number(host, address)
    except Stuck as error:
        raise Stuck(
            f"{address}: reading its config gave no answer: the device is locked, as in a reset",
            hint="end what holds the device, then: vfiotool recover",
            device=address,
        ) from error
    return Identity(
        vendor=found.vendor,
        device=found.device,
        subsystem_vendor=found.subsystem_vendor,
        subsystem_device=found.subsystem_device,
        serial=serial,
    )


def read_msix_count(host: Host, address: str) -> int | None:
    """How many MSI-X vectors a function has, as its capability says; None without, or untold.

    `sriov_vf_msix_count` itself can only be written (drivers/pci/iov.c).
    """
    try:
        config = host.read_bytes(f"{SYS_PCI_DEVICES}/{address}/config")
    except OSError:
        return None
    return msix_count(config)


def msix_count(config: bytes) -> int | None:
    """The MSI-X table size in a configuration space (PCI Local Bus 3.0, 6.8.2.3)."""
    from vfiotool.devices.config.decode import parse_config

    found = (item for item in parse_config(config).capabilities if not item.extended)
    sizes = (item.fields.get("vectors") for item in found if item.id == _CAP_MSIX)
    size = next(sizes, None)
    return size if isinstance(size, int) else None


def read_num_vfs(host: Host, pf: str) -> int:
    """`sriov_numvfs` now. Raises NotFound if there is no such attribute, Stuck if no answer."""
    path = f"{SYS_PCI_DEVICES}/{pf}/sriov_numvfs"
    text = read_locked(host, pf, path)
    if text is None:
        raise NotFound(
            f"{pf} has no SR-IOV", hint="vfiotool vf list shows those that have", device=pf
        )
    return int(text)


def read_mdev_place(host: Host, uuid: str) -> tuple[str, str] | None:
    """Parent and type of an mdev, or None if there is no such mdev."""
    base = f"{SYS_MDEV_DEVICES}/{uuid}"
    path = host.realpath(base)
    if path is None:
        return None
    kind = host.linkname(f"{base}/mdev_type")
    return None if kind is None else (path.split("/")[-2], kind)


def driver_registered(host: Host, bus: str, driver: str) -> bool:
    return host.isdir(f"{BUSES[bus].drivers}/{driver}")


def device_nodes(host: Host, bus: str, name: str) -> tuple[str, ...]:
    """The VFIO nodes that hold a device while they are open: group node and device cdev."""
    base = f"{SYS_MDEV_DEVICES if bus == 'mdev' else BUSES[bus].devices}/{name}"
    nodes = []
    group = host.linkname(f"{base}/iommu_group")
    if group is not None:
        nodes += [f"{DEV_VFIO}/{group}", f"{DEV_VFIO}/noiommu-{group}"]
    nodes += [f"{DEV_VFIO}/devices/{cdev}" for cdev in host.listdir(f"{base}/vfio-dev")]
    return tuple(nodes)


def read_holders(host: Host, nodes: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Process ids and names that have one of `nodes` open, by id (needs root to see all)."""
    wanted = set(nodes)
    found = []
    for pid in host.listdir(PROC):
        if not pid.isdecimal():
            continue
        base = f"{PROC}/{pid}/fd"
        files = (host.readlink(f"{base}/{fd}") or "" for fd in host.listdir(base))
        # The node of a device that is being unbound is gone, and so procfs calls it.
        if any(file.removesuffix(" (deleted)") in wanted for file in files):
            found.append((int(pid), host.read(f"{PROC}/{pid}/comm") or "?"))
    return tuple(sorted(found))
