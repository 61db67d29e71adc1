"""Everything about one device, for `show`."""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.as_json import function_as_json, vpd_as_json
from vfiotool.devices.config.vpd import Vpd
from vfiotool.devices.details import DetailReader, Details, read_details, read_vpd
from vfiotool.devices.iommu import IommuGroup, group_as_json, read_group
from vfiotool.devices.mdev import Mdev, MdevType, read_mdev_types, read_mdevs
from vfiotool.devices.names import Names, read_names
from vfiotool.devices.pci import Address, PciFunction, read_function
from vfiotool.errors import NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV_VFIO, SYS_MDEV_DEVICES


@dataclass(frozen=True)
class ShownFunction:
    """A PCI function and all around it."""

    function: PciFunction
    details: Details
    names: Names
    group: IommuGroup | None
    vpd: Vpd | None
    mdev_types: tuple[MdevType, ...]


@dataclass(frozen=True)
class ShownMdev:
    """A mediated device and its group. `group_node` opens it, where it is there."""

    mdev: Mdev
    driver: str | None
    group: IommuGroup | None
    group_node: str | None


def read_shown(host: Host, name: str) -> ShownFunction | ShownMdev:
    """The device of this full address or UUID. Raises NotFound if there is none."""
    if not Address.is_address(name):
        return _read_mdev(host, name)
    function = read_function(host, name)
    if function is None:
        raise NotFound(f"no PCI function {name}", hint="vfiotool devices lists them", device=name)
    number = function.iommu_group
    details = DetailReader(host).read(function)
    types = read_mdev_types(host) if details.mdev_parent else ()
    has_vpd = details.config is not None and details.config.find("vpd") is not None
    return ShownFunction(
        function=function,
        details=details,
        names=read_names(host),
        group=None if number is None else read_group(host, number),
        vpd=read_vpd(host, name) if has_vpd else None,
        mdev_types=tuple(item for item in types if item.parent == name),
    )


def read_everything(host: Host) -> None:
    """Read whatever `devices` and `show` can ask of any device here: a snapshot's probe."""
    read_details(host)
    for mdev in read_mdevs(host):
        _read_mdev(host, mdev.uuid)


def _read_mdev(host: Host, uuid: str) -> ShownMdev:
    mdev = next((item for item in read_mdevs(host) if item.uuid == uuid), None)
    if mdev is None:
        raise NotFound(
            f"no mediated device {uuid}", hint="vfiotool mdev list names them", device=uuid
        )
    number = mdev.iommu_group
    node = f"{DEV_VFIO}/{number}"
    return ShownMdev(
        mdev=mdev,
        driver=host.linkname(f"{SYS_MDEV_DEVICES}/{uuid}/driver"),
        group=None if number is None else read_group(host, number),
        group_node=node if number is not None and host.exists(node) else None,
    )


def shown_as_json(shown: ShownFunction | ShownMdev) -> dict[str, object]:
    """`show`'s object: a function's as in `devices`, with its group, VPD and mdev types."""
    group = None if shown.group is None else group_as_json(shown.group)
    if isinstance(shown, ShownMdev):
        mdev = shown.mdev
        return {
            "uuid": mdev.uuid,
            "parent": mdev.parent,
            "type": mdev.type,
            "iommu_group": mdev.iommu_group,
            "driver": shown.driver,
            "vfio_group_node": shown.group_node,
            "group": group,
        }
    return {
        **function_as_json(shown.function, shown.details, shown.names),
        "vpd": None if shown.vpd is None else vpd_as_json(shown.vpd),
        "mdev_types": [
            {
                "type": item.type,
                "name": item.name,
                "device_api": item.device_api,
                "available_instances": item.available_instances,
                "description": item.description,
            }
            for item in shown.mdev_types
        ],
        "group": group,
    }
