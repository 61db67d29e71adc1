"""QEMU's options for VFIO devices (QEMU: docs/system/devices, `-device vfio-pci,help`)."""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.devices.pci import Address
from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed

# Slots of the root bus for the root ports, counted down from the top of what q35 leaves free.
_FIRST_SLOT = 0x1B


def arguments(
    devices: Sequence[Handed], *, iommufd: bool = False, vf_token: str | None = None
) -> list[str]:
    """The words to add to a q35 machine's command line, two for each option.

    Each slot of the host becomes one PCIe root port, so that the functions of one card (a GPU and
    its audio) stay functions of one device in the guest. What is not on PCI in the guest (vfio-ap,
    vfio-ccw, functions of s390x) gets no port. `iommufd` adds the object that the
    devices then share; it needs QEMU 8.2 or newer. `vf_token` goes to those that have a guard.
    Raises Unsupported for a token through iommufd.
    """
    guarded = [device.name for device in devices if device.guard is not None]
    if iommufd and vf_token is not None and guarded:
        # uapi/linux/vfio.h: VFIO_DEVICE_BIND_IOMMUFD takes none, but for the newest kernels.
        raise Unsupported(
            f"{guarded[0]} wants a VF token, which iommufd does not take",
            hint="leave --iommufd out",
            device=guarded[0],
        )
    words = ["-object", "iommufd,id=iommufd0"] if iommufd else []
    ports: dict[str, list[Handed]] = {}
    for number, device in enumerate(devices):
        if _on_pci(device):
            ports.setdefault(_slot_of(device), []).append(device)
        else:
            words += ["-device", _without_port(device, number, iommufd, vf_token)]
    for number, members in enumerate(ports.values()):
        port = f"vfio-rp{number}"
        chassis, slot = number + 100, _FIRST_SLOT - number // 8
        place = f"addr={slot:#x}.{number % 8}" + (",multifunction=on" if number % 8 == 0 else "")
        words += ["-device", f"pcie-root-port,id={port},bus=pcie.0,chassis={chassis},{place}"]
        functions = _functions(members)
        for device, function in zip(members, functions, strict=True):
            words += ["-device", _device(device, port, function, len(members) > 1, iommufd)]
            if vf_token is not None and device.guard is not None:
                words[-1] += f",vf-token={vf_token}"
    return words


def _on_pci(device: Handed) -> bool:
    return device.model == "vfio-pci" and not device.zpci


def _without_port(device: Handed, number: int, iommufd: bool, vf_token: str | None) -> str:
    """A device of s390x: channel and crypto devices have no bus, zPCI functions take the first.

    Source: QEMU's docs/system/s390x/vfio-ap.rst, vfio-ccw.rst and pcidevices.rst.
    """
    parts = [device.model, _source(device), f"id={_identifier(device.name)}"]
    if device.model == "vfio-ccw":
        parts.append(f"devno=fe.0.{number:04x}")
    if iommufd:
        parts.append("iommufd=iommufd0")
    if vf_token is not None and device.guard is not None:
        parts.append(f"vf-token={vf_token}")
    return ",".join(parts)


def _source(device: Handed) -> str:
    """`host=` where QEMU can read the address: it takes 16 bits of domain (VMD has more)."""
    if device.is_mdev or device.address.domain > 0xFFFF:
        return f"sysfsdev={device.path}"
    return f"host={device.name}"


def _slot_of(device: Handed) -> str:
    # Each VF has a slot of its own: its functions are not those of one card.
    if device.function is None or device.function.physfn is not None:
        return device.name
    return device.name.rpartition(".")[0]


def _functions(members: Sequence[Handed]) -> list[int]:
    """Function numbers in the guest; those of the host where one of them is 0, as it must be."""
    if len(members) == 1:
        return [0]
    own = [device.address.function for device in members]
    return own if 0 in own else list(range(len(members)))


def _device(device: Handed, port: str, function: int, several: bool, iommufd: bool) -> str:
    parts = [device.model, _source(device), f"id={_identifier(device.name)}", f"bus={port}"]
    if several:
        parts.append(f"addr=0x0.{function}")
        if function == 0:
            parts.append("multifunction=on")
    if iommufd:
        parts.append("iommufd=iommufd0")
    return ",".join(parts)


def _identifier(name: str) -> str:
    """A QEMU id: letters, digits and -._ only, a letter first (QEMU: qom, id_wellformed)."""
    if Address.is_address(name):
        return "vfio-" + name.replace(":", "-")
    return f"mdev-{name}"
