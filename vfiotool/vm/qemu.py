"""QEMU's options for devices (QEMU: docs/system/devices, `-device vfio-pci,help`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vfiotool.devices.pci import Address
from vfiotool.errors import Unsupported
from vfiotool.vm.handed import VDPA, Handed
from vfiotool.vm.machine import Q35, GuestMachine

PROGRAM = "QEMU"
# Slots of the root bus for the root ports, counted down from the top of what q35 leaves free, and
# not to where it puts devices that have no address.
FIRST_SLOT = 0x1B
_LAST_SLOT = 0x02
# Each root port takes a bus number, of which there are 256; a chassis is a number of eight bits.
_MOST_PORTS = 128
_MEMORY = "vfiotool-mem"
_DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class QemuChoice:
    """How the devices are opened. `memory_bytes` None leaves `-m` to the caller, unless the memory
    has to be shared: it then is 1 GiB."""

    iommufd: bool = False
    vf_token: str | None = None
    memory_bytes: int | None = None
    guest: GuestMachine = Q35


def arguments(
    devices: Sequence[Handed],
    *,
    iommufd: bool = False,
    vf_token: str | None = None,
    memory_bytes: int | None = None,
    guest: GuestMachine = Q35,
    first_slot: int = FIRST_SLOT,
) -> list[str]:
    """The words to add to the command line of a machine such as `guest`, two for each option.

    Each slot of the host becomes one PCIe root port, so that the functions of one card (a GPU and
    its audio) stay functions of one device in the guest. What is not on PCI in the guest (vfio-ap,
    vfio-ccw, functions of s390x) gets no port, nor does anything on a machine without PCI Express.
    The root bus is taken from `first_slot` down. `iommufd` adds the object that the devices then
    share. `vf_token` goes to those that have a guard. vDPA devices and sockets bring the memory
    that they need to be shared. Raises Unsupported for a token through iommufd, for a vDPA device
    that is not on vhost_vdpa, and for more cards than the root bus has places.
    """
    choice = QemuChoice(iommufd, vf_token, memory_bytes, guest)
    guarded = [device.name for device in devices if device.guard is not None]
    if iommufd and vf_token is not None and guarded:
        # uapi/linux/vfio.h: VFIO_DEVICE_BIND_IOMMUFD takes none, but for the newest kernels.
        raise Unsupported(
            f"{guarded[0]} wants a VF token, which iommufd does not take",
            hint="leave --iommufd out",
            device=guarded[0],
        )
    words = _memory(devices, memory_bytes)
    if iommufd and any(device.through_vfio for device in devices):
        words += ["-object", "iommufd,id=iommufd0"]
    for number, device in enumerate(devices):
        if not _on_pci(device):
            words += ["-device", _without_port(device, number, choice)]
    ports = _ports(devices)
    _require_room(len(ports), first_slot, guest)
    for number, members in enumerate(ports):
        words += _card(members, number, first_slot, choice)
    return words


def _require_room(cards: int, first_slot: int, guest: GuestMachine) -> None:
    slots = first_slot - _LAST_SLOT + 1
    most = min(slots * 8, _MOST_PORTS) if guest.root_ports else slots
    if cards > most:
        raise Unsupported(
            f"the root bus of {guest.kind} has places for {most} cards, these are {cards}"
        )


def _card(members: Sequence[Handed], number: int, first_slot: int, choice: QemuChoice) -> list[str]:
    """The root port of one card, where the machine takes any, and the card's functions."""
    words, guest = [], choice.guest
    if guest.root_ports:
        port, chassis = f"vfio-rp{number}", number + 100
        slot, function = _port_place(number, first_slot)
        place = f"addr={slot:#x}.{function}" + (",multifunction=on" if function == 0 else "")
        options = f"id={port},bus={guest.root_bus},chassis={chassis},{place}"
        words += ["-device", f"pcie-root-port,{options}"]
        bus, own_slot = port, 0
    else:
        bus, own_slot = guest.root_bus, first_slot - number
    if not members[0].through_vfio:
        return [*words, *_served(members[0], bus, own_slot, number)]
    for device, function in zip(members, guest_functions(members), strict=True):
        place = f"addr={own_slot:#x}.{function}" if len(members) > 1 or own_slot else ""
        if len(members) > 1 and function == 0:
            place += ",multifunction=on"
        words += ["-device", _device(device, bus, place, choice)]
    return words


def _ports(devices: Sequence[Handed]) -> list[list[Handed]]:
    """Who shares a root port, for each of them: the functions of one slot."""
    ports: dict[str, list[Handed]] = {}
    for device in devices:
        if _on_pci(device):
            ports.setdefault(slot_of(device), []).append(device)
    return list(ports.values())


def _port_place(number: int, first_slot: int = FIRST_SLOT) -> tuple[int, int]:
    """Slot and function of a root port on the guest's root bus."""
    return first_slot - number // 8, number % 8


def guest_places(devices: Sequence[Handed]) -> dict[str, str]:
    """Where the guest finds each device: its root port's address there and its function, such as
    `0000:00:1b.0/0`. What is not on PCI in the guest is left out."""
    found = {}
    for number, members in enumerate(_ports(devices)):
        slot, port_function = _port_place(number)
        for device, function in zip(members, guest_functions(members), strict=True):
            found[device.name] = f"0000:00:{slot:02x}.{port_function}/{function}"
    return found


def features_of(devices: Iterable[Handed], *, iommufd: bool, vf_token: str | None) -> set[str]:
    """What of `releases.OLDEST` the options make use of."""
    found = {"iommufd"} if iommufd else set()
    for device in devices:
        if vf_token is not None and device.guard is not None:
            found.add("vf-token")
        kind = "vdpa-net" if (device.model, device.virtio) == (VDPA, "net") else device.model
        found.add(kind)
    return found


def _memory(devices: Sequence[Handed], size: int | None) -> list[str]:
    shared = any(device.shares_memory for device in devices)
    if not shared:
        return [] if size is None else ["-m", f"{size >> 20}M"]
    mib = (size or _DEFAULT_MEMORY) >> 20
    backend = f"memory-backend-memfd,id={_MEMORY},size={mib}M,share=on"
    return ["-m", f"{mib}M", "-object", backend, "-numa", f"node,memdev={_MEMORY}"]


def _on_pci(device: Handed) -> bool:
    return device.model not in ("vfio-ap", "vfio-ccw") and not device.zpci


def _without_port(device: Handed, number: int, choice: QemuChoice) -> str:
    """A device of s390x: channel and crypto devices have no bus, zPCI functions take the first.

    Source: QEMU's docs/system/s390x/vfio-ap.rst, vfio-ccw.rst and pcidevices.rst.
    """
    parts = [device.model, _source(device), f"id={identifier(device)}"]
    if device.model == "vfio-ccw":
        parts.append(f"devno=fe.0.{number:04x}")
    if choice.iommufd:
        parts.append("iommufd=iommufd0")
    if choice.vf_token is not None and device.guard is not None:
        parts.append(f"vf-token={choice.vf_token}")
    return ",".join(parts)


def _served(device: Handed, bus: str, slot: int, number: int) -> list[str]:
    """A vDPA device or a device on a socket: its back end, and its virtio device."""
    name, path = f"{device.model}{number}", device.path
    port = f"{bus},addr={slot:#x}" if slot else bus
    if device.model == VDPA:
        if not path:
            raise Unsupported(
                f"{device.name} has no vhost-vdpa node",
                hint=f"vfiotool vdpa bind {device.name} vhost_vdpa",
                device=device.name,
            )
        if device.virtio == "net":
            backend = f"type=vhost-vdpa,id={name},vhostdev={path}"
            front = f"virtio-net-pci,netdev={name},id={name}-pci,bus={port}"
            return ["-netdev", backend, "-device", front]
        return ["-device", f"vhost-vdpa-device-pci,vhostdev={path},id={name},bus={port}"]
    if device.model == "vfio-user":
        whole = {
            "driver": "vfio-user-pci",
            "id": name,
            "bus": bus,
            **({"addr": f"{slot:#x}"} if slot else {}),
            "socket": {"type": "unix", "path": path},
        }
        return ["-device", json.dumps(whole, separators=(",", ":"))]
    # QEMU's options end at a comma, unless it is doubled (docs/system/invocation: QEMU options).
    words = ["-chardev", f"socket,id={name}-chr,path={path.replace(',', ',,')}"]
    if device.model == "vhost-user-net":
        words += ["-netdev", f"type=vhost-user,id={name},chardev={name}-chr"]
        return [*words, "-device", f"virtio-net-pci,netdev={name},id={name}-pci,bus={port}"]
    return [*words, "-device", f"vhost-user-blk-pci,chardev={name}-chr,id={name},bus={port}"]


def _source(device: Handed) -> str:
    """`host=` where QEMU can read the address: it takes 16 bits of domain (VMD has more)."""
    if device.is_mdev or device.address.domain > 0xFFFF:
        return f"sysfsdev={device.path}"
    if device.function is not None and device.function.driver == "nvidia":
        # A vendor's vGPU: QEMU's host= asks for the same, its sysfsdev= is what vendors document.
        return f"sysfsdev={device.path}"
    return f"host={device.name}"


def slot_of(device: Handed) -> str:
    """What becomes one device of the guest: the functions of one slot, a VF by itself."""
    # Each VF has a slot of its own: its functions are not those of one card.
    if device.function is None or device.function.physfn is not None:
        return device.name
    return device.name.rpartition(".")[0]


def guest_functions(members: Sequence[Handed]) -> list[int]:
    """Function numbers in the guest; those of the host where one of them is 0, as it must be."""
    if len(members) == 1:
        return [0]
    own = [device.address.function for device in members]
    return own if 0 in own else list(range(len(members)))


def _device(device: Handed, bus: str, place: str, choice: QemuChoice) -> str:
    parts = [device.model, _source(device), f"id={identifier(device)}", f"bus={bus}"]
    if place:
        parts.append(place)
    if choice.iommufd:
        parts.append("iommufd=iommufd0")
    if choice.vf_token is not None and device.guard is not None:
        parts.append(f"vf-token={choice.vf_token}")
    return ",".join(parts)


def identifier(device: Handed) -> str:
    """A QEMU id: letters, digits and -._ only, a letter first (QEMU: qom, id_wellformed)."""
    if Address.is_address(device.name):
        return "vfio-" + device.name.replace(":", "-")
    return f"mdev-{device.name}"
