"""From a host's facts to the machine that is its twin. Pure: facts in, a description out.

QEMU's q35 brings the root complex, and its chipset the functions of slot 1f; everything else is
made here: ports, switches and bridges by QEMU's models, endpoints as replays of their configuration
spaces, or as stand-ins of QEMU's where a real driver has to work on them. What differs from the
original is said, line by line. The firmware numbers buses depth first, so that addresses in the
twin are known before it runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vfiotool.lab.machines import DeviceModel, Disk, Iommu
from vfiotool.lab.twin_facts import TwinFunction, TwinHost
from vfiotool.lab.twin_lacks import TwinLack

# An NVMe controller is a model with the original's ids and serial; the others are QEMU's.
StandIn = Literal["nvme", "network", "sata", "sriov"]
# Slots of the root bus that are not free: the root complex, the lab's own devices, the chipset.
LAB_SLOT, CHIPSET_SLOT = 0x1E, 0x1F
_TAKEN = (0x00, LAB_SLOT, CHIPSET_SLOT)
# What q35's chipset has in slot 1f: function -> class and subclass.
_CHIPSET = {0: 0x0601, 2: 0x0106, 3: 0x0C05}
_HOST_BRIDGE, _IOMMU = 0x0600, 0x0806
# Where QEMU's igb has its virtual functions, and how many.
_VF_OFFSET, _VF_STRIDE, _VFS = 128, 2, 7
# Extra root buses sit in slots of the first one, from here downwards.
_EXPANDERS = range(0x1C, 0, -1)
_LAB_VENDOR = 0x1AF4
_VIRTIO_IOMMU = 0x1AF41057
# Cards that Linux knows to mask their interrupt pin wrongly (drivers/pci/quirks.c,
# quirk_broken_intx_masking): uio_pci_generic, which holds cards in a twin, takes none with a pin.
_BROKEN_INTX = frozenset(
    {0x14250030, 0x18140601, 0x1B7C0004, 0x1102000B, 0x10EC8169}
    | {0x80860000 | device for device in (0x1572, 0x1574, 0x1580, 0x1581, *range(0x1583, 0x158C))}
    | {0x80860000 | device for device in (0x37D0, 0x37D1, 0x37D2)}
)
_HEADER_BYTES, _LAST_BUS = 64, 0xFF
# Below these there is slot 0 alone.
_LINKS = ("pcie-root-port", "xio3130-downstream")
_SWITCH = "x3130-upstream"
_EXPRESS = (*_LINKS, _SWITCH, "pcie-pci-bridge")
# QEMU's IOMMUs have 39 or 48 bits.
_WIDE_BITS = 48


@dataclass(frozen=True)
class Replay:
    """An endpoint that is served from the configuration space of `original`, with the properties
    that its `-device` has; with `disk` as an NVMe controller that works, without its interrupt pin
    where `pin` is not set."""

    original: TwinFunction
    properties: tuple[tuple[str, str], ...]
    disk: bool = False
    pin: bool = True


@dataclass(frozen=True)
class TwinPlan:
    """A twin. `items` are its devices in the order that QEMU has to be told of them; `addresses`
    maps the original's to the twin's; `lacks` is what it cannot have. `acs_off` are the twin's
    ports whose isolation is turned off, `in_use` the stand-ins that are mounted or have the route,
    `vfs` how many virtual functions each of the twin's functions is to have."""

    iommu: Iommu
    iommu_bits: int | None
    items: tuple[DeviceModel | Replay, ...]
    addresses: Mapping[str, str]
    lacks: tuple[TwinLack, ...]
    acs_off: tuple[str, ...]
    disks: tuple[Disk, ...]
    networks: tuple[str, ...]
    stand_ins: Mapping[str, StandIn]
    in_use: frozenset[str]
    vfs: Mapping[str, int]
    numa_nodes: int

    @property
    def replays(self) -> list[Replay]:
        return [item for item in self.items if isinstance(item, Replay)]

    @property
    def differences(self) -> tuple[str, ...]:
        """What it cannot have, in sentences."""
        return tuple(lack.line for lack in self.lacks)

    @property
    def kernel_arguments(self) -> tuple[str, ...]:
        """Further words for the guest's kernel."""
        words = []
        if self.acs_off:
            words.append("pci=disable_acs_redir=" + ";".join(self.acs_off))
        return tuple(words)


@dataclass
class _Making:
    """What is known while the plan is made."""

    host: TwinHost
    stand_ins: Mapping[str, StandIn]
    children: dict[str, list[TwinFunction]]
    items: list[DeviceModel | Replay] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    lacks: list[TwinLack] = field(default_factory=list)
    acs_off: list[str] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    used: dict[str, StandIn] = field(default_factory=dict)
    vfs: dict[str, int] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=lambda: {"pcie.0": "pcie.0"})
    next_bus: int = 1
    chassis: int = 1

    def lack(self, kind: str, line: str) -> None:
        self.lacks.append(TwinLack(kind, line))


def plan_twin(
    host: TwinHost,
    stand_ins: Mapping[str, StandIn] | None = None,
    in_use: frozenset[str] = frozenset(),
) -> TwinPlan:
    """The twin of `host`. `stand_ins` are the endpoints that a driver has to work on, `in_use`
    those of them that the host uses."""
    children: dict[str, list[TwinFunction]] = defaultdict(list)
    for one in host.functions:
        children[one.parents[-1] if one.parents else one.root].append(one)
    making = _Making(host, stand_ins or {}, dict(children))
    roots = sorted({one.root for one in host.functions})
    first = roots[0] if roots else ""
    further = [root for root in roots[1:] if root.startswith("0000:")]
    slots = _root_slots(making, [root for root in roots if root not in further])
    expanders = _expander_slots(making, further, slots)
    for slot, functions in sorted(slots.items()):
        _place_slot(making, "pcie.0", 0, slot, functions)
    for root, slot in expanders.items():
        _place_root(making, root, slot)
    _place_vfs(making)
    _compare_chipset(making)
    _say_what_is_missing(making)
    if host.nodes > 1:
        making.lack(
            "numa",
            f"root bus {first}: its devices have no NUMA node, as q35 tells none for its own",
        )
    apart = [one.address for one in host.functions if one.group is None]
    if host.iommu == "virtio" and apart:
        making.lack(
            "no-group",
            f"{', '.join(apart)}: no group on the host, as no driver looked at it there",
        )
    if host.reserved:
        groups = ", ".join(host.reserved)
        making.lack(
            "reserved",
            f"groups {groups}: direct reserved regions are the firmware's, a guest's has none",
        )
    return TwinPlan(
        host.iommu,
        _bits(making),
        tuple(making.items),
        making.addresses,
        tuple(making.lacks),
        tuple(making.acs_off),
        tuple(making.disks),
        tuple(making.networks),
        making.used,
        in_use & making.used.keys(),
        making.vfs,
        host.nodes,
    )


def _say_what_is_missing(making: _Making) -> None:
    """What is below a root bus or a bridge that is left out, and what is cut."""
    said = " ".join(lack.line for lack in making.lacks)
    functions = making.host.functions
    lost = [one.address for one in functions if one.address not in making.addresses]
    lost = [one for one in lost if one not in said]
    if lost:
        making.lack("left-out", f"{', '.join(lost)}: left out with what is above")
    cut = [one for one in functions if one.is_cut and one.address in making.addresses]
    ports = [one.address for one in cut if one.port is not None]
    ends = [one.address for one in cut if one.port is None and len(one.config) >= _HEADER_BYTES]
    if ports:
        making.lack(
            "config",
            f"{', '.join(ports)}: without capabilities in the snapshot (taken without root?), their"
            " kinds are guessed from drivers and groups",
        )
    if ends:
        making.lack(
            "config",
            f"{', '.join(ends)}: without capabilities in the snapshot (taken without root?), and so"
            " in the twin",
        )


def _expander_slots(
    making: _Making, further: list[str], slots: Mapping[int, list[TwinFunction]]
) -> dict[str, int]:
    """A slot of the first root bus for each further root in domain 0."""
    free = (slot for slot in _EXPANDERS if slot not in slots and _is_free(making, slot, []))
    found = dict(zip(further, free, strict=False))
    for root in further:
        if root not in found:
            making.lack("no-room", f"root bus {root}: left out, the first root bus is full")
    return found


def _place_root(making: _Making, root: str, slot: int) -> None:
    """A further root bus, of its own number where the buses before it leave that free."""
    wanted = int(root.rpartition(":")[2], 16)
    number = max(wanted, making.next_bus)
    functions = making.children.get(root, [])
    if number > _LAST_BUS:
        making.lack("no-room", f"root bus {root}: left out, there are 256 buses")
        return
    if number != wanted:
        making.lack("bus-number", f"root bus {root}: its number is {number:02x} in the twin")
    name = f"root{number:x}"
    properties = [("id", name), ("bus", "pcie.0"), ("addr", f"{slot:#x}"), ("bus_nr", str(number))]
    nodes = {one.numa_node for one in functions if 0 <= one.numa_node < making.host.nodes}
    if making.host.nodes > 1 and len(nodes) == 1:
        properties.append(("numa_node", str(nodes.pop())))
    making.items.append(DeviceModel("pxb-pcie", tuple(properties)))
    making.models[name] = "pxb-pcie"
    making.next_bus = number + 1
    for where, found in sorted(_by_slot(functions).items()):
        rest = [one for one in found if not _is_given(making, one, where, first=False)]
        _place_slot(making, name, number, where, rest)


def _place_vfs(making: _Making) -> None:
    """The virtual functions of the stand-ins for network cards, by their numbers."""
    by_pf: dict[str, list[TwinFunction]] = defaultdict(list)
    for one in making.host.functions:
        if one.is_vf and one.physfn is not None:
            by_pf[one.physfn].append(one)
    for pf, vfs in by_pf.items():
        new = making.addresses.get(pf)
        if making.used.get(pf) != "sriov" or new is None:
            continue
        bus, _, rest = new[5:].partition(":")
        base = int(rest[:2], 16) << 3 | int(rest[3:])
        making.vfs[new] = min(len(vfs), _VFS)
        for number, one in enumerate(sorted(vfs, key=lambda vf: vf.address)):
            at = base + _VF_OFFSET + _VF_STRIDE * number
            if number < _VFS:
                making.addresses[one.address] = f"0000:{bus}:{at >> 3:02x}.{at & 7}"
            else:
                making.lack(
                    "virtual-functions",
                    f"{one.address}: left out, the stand-in has {_VFS} virtual functions",
                )


def _compare_chipset(making: _Making) -> None:
    """Functions of QEMU's chipset that the original has not are in a slot, and a group, with those
    that it has."""
    slot = f"0000:00:{CHIPSET_SLOT:02x}."
    there = [one for one in making.addresses.values() if one.startswith(slot)]
    more = [f"{slot}{number}" for number in _CHIPSET if f"{slot}{number}" not in there]
    if there and more:
        names = [old for old, new in making.addresses.items() if new in there]
        making.lack("chipset", f"{', '.join(names)}: QEMU's chipset has {', '.join(more)} as well")


def _bits(making: _Making) -> int | None:
    bits = making.host.iommu_bits
    if making.host.iommu != "intel" or bits is None:
        return None
    chosen = 39 if bits < _WIDE_BITS else _WIDE_BITS
    if chosen != bits:
        making.lack(
            "iommu-width", f"the IOMMU reaches {chosen} bits: QEMU has 39 or 48, not {bits}"
        )
    return chosen


def _root_slots(making: _Making, roots: list[str]) -> dict[int, list[TwinFunction]]:
    """What is in each slot of the twin's root bus: the first root's devices in their own slots,
    where those are free, and all others where there is room."""
    found: dict[int, list[TwinFunction]] = {}
    homeless: list[list[TwinFunction]] = []
    for root in roots:
        first = root == roots[0]
        if not first:
            making.lack(
                "domain",
                f"root bus {root}: its devices are on the twin's first root bus, in domain 0",
            )
        for slot, functions in sorted(_by_slot(making.children.get(root, [])).items()):
            rest = [one for one in functions if not _is_given(making, one, slot, first=first)]
            if not rest:
                continue
            if first and _is_free(making, slot, rest):
                found[slot] = rest
            else:
                homeless.append(rest)
    for rest in homeless:
        free = [
            slot for slot in range(1, LAB_SLOT) if slot not in found and _is_free(making, slot, [])
        ]
        names = ", ".join(one.address for one in rest)
        if not free:
            making.lack("no-room", f"{names}: left out, the root bus is full")
            continue
        found[free[0]] = rest
        making.lack("slot", f"{names}: in slot {free[0]:02x} of the twin's root bus")
    return found


def _by_slot(functions: list[TwinFunction]) -> dict[int, list[TwinFunction]]:
    slots: dict[int, list[TwinFunction]] = defaultdict(list)
    for one in functions:
        slots[one.slot].append(one)
    return slots


def _is_given(making: _Making, one: TwinFunction, slot: int, *, first: bool) -> bool:
    """Whether QEMU or the lab brings this one anyway; then its address is the twin's too."""
    kind = one.class_code >> 8
    if kind == _HOST_BRIDGE:
        if slot == 0 and one.function == 0 and first:
            making.addresses[one.address] = "0000:00:00.0"
            if one.ids != "8086:29c0":
                making.lack(
                    "host-bridge",
                    f"{one.address}: the host bridge is QEMU's (8086:29c0), not {one.ids}",
                )
            return True
        making.lack(
            "further-host-bridge", f"{one.address}: a host bridge besides the first is left out"
        )
        return True
    if kind == _IOMMU:
        making.lack("iommu-function", f"{one.address}: the IOMMU's function is QEMU's, in slot 1d")
        return True
    if first and slot == CHIPSET_SLOT and _CHIPSET.get(one.function) == kind:
        making.addresses[one.address] = f"0000:00:1f.{one.function}"
        if one.vendor != 0x8086:
            making.lack("chipset", f"{one.address}: the chipset's function is QEMU's")
        return True
    if first and slot == LAB_SLOT and one.vendor == _LAB_VENDOR:
        # A snapshot of a lab guest.
        making.lack("lab", f"{one.address}: of the lab, which has its own in the twin")
        return True
    if one.vendor << 16 | one.device == _VIRTIO_IOMMU:
        making.addresses[one.address] = "0000:00:1d.0"
        return True
    return False


def _is_free(making: _Making, slot: int, rest: list[TwinFunction]) -> bool:
    if slot == CHIPSET_SLOT:
        return all(one.function not in _CHIPSET for one in rest)
    if slot == 0x1D and making.host.iommu in ("virtio", "amd"):
        return False
    return slot not in _TAKEN


def _place_slot(
    making: _Making, bus: str, number: int, slot: int, functions: list[TwinFunction]
) -> None:
    """The functions of one slot, on the QEMU bus `bus` whose number will be `number`."""
    wanted = [one for one in functions if not _left_out(making, one)]
    if not wanted:
        return
    several = len(wanted) > 1 or wanted[0].function != 0
    have_first = any(one.function == 0 for one in wanted)
    for one in sorted(wanted, key=lambda one: one.function):
        function = one.function
        if not have_first and one is wanted[0] and slot != CHIPSET_SLOT:
            function = 0
            making.lack("function-0", f"{one.address}: function 0, as the original's is left out")
        here = f"0000:{number:02x}:{slot:02x}.{function}"
        making.addresses[one.address] = here
        if not one.address.startswith("0000:"):
            making.lack("domain", f"{one.address}: QEMU has domain 0 alone, it is {here} there")
        properties = [("bus", bus), ("addr", f"{slot:#x}.{function:#x}")]
        if several:
            properties.append(("multifunction", "on"))
        if one.port is not None:
            _place_bridge(making, one, here, tuple(properties))
        else:
            _place_endpoint(making, one, tuple(properties))


def _left_out(making: _Making, one: TwinFunction) -> bool:
    if one.is_vf:
        if making.stand_ins.get(one.physfn or "") != "sriov":
            making.lack(
                "virtual-functions", f"{one.address}: a virtual function; replayed cards make none"
            )
        return True
    if one.port is None and len(one.config) < _HEADER_BYTES:
        making.lack("config", f"{one.address}: its configuration space is not in the snapshot")
        return True
    if one.port is None and one.config[0x0E] & 0x7F:
        gone = one.config[:2] == b"\xff\xff"
        said = "reads as all ones" if gone else "is not an endpoint's"
        making.lack("config", f"{one.address}: its configuration space {said}")
        return True
    if one.port is not None and making.next_bus > _LAST_BUS:
        making.lack("no-room", f"{one.address}: left out, there are 256 buses")
        return True
    return False


def _place_bridge(
    making: _Making, one: TwinFunction, here: str, properties: tuple[tuple[str, str], ...]
) -> None:
    if making.next_bus > _LAST_BUS:
        # Others of its slot took the last ones.
        del making.addresses[one.address]
        making.lack("no-room", f"{one.address}: left out, there are 256 buses")
        return
    name = f"b{making.chassis}"
    own = {
        "root port": "pcie-root-port",
        "upstream": _SWITCH,
        "downstream": "xio3130-downstream",
        "pcie to pci": "pcie-pci-bridge",
    }.get(one.port or "", "pci-bridge")
    model = making.models[name] = _fitting(own, making.models[dict(properties)["bus"]])
    below = " ".join(far.address for far in making.host.functions if one.address in far.parents)
    if model != own:
        making.lack("bridge", f"{one.address}: {model}, QEMU has no {own} there ({below})")
    more: list[tuple[str, str]] = [("id", name)]
    if model in ("pcie-root-port", "xio3130-downstream", "pci-bridge"):
        more.append(("chassis_nr" if model == "pci-bridge" else "chassis", str(making.chassis)))
    making.chassis += 1
    making.items.append(DeviceModel(model, (*more, *properties)))
    if model == "pcie-root-port" and not one.acs_on:
        making.acs_off.append(here)
    if model == "xio3130-downstream" and one.acs_on:
        making.lack(
            "switch-acs",
            f"{one.address}: QEMU's switch ports have no ACS, the original isolates what is below"
            f" ({below or 'nothing now'})",
        )
    number = making.next_bus
    making.next_bus += 1
    for slot, functions in sorted(_slots_below(making, one, model).items()):
        _place_slot(making, name, number, slot, functions)


def _fitting(model: str, above: str) -> str:
    """QEMU's bridge in the place of `model` below one of kind `above`: the ports of a switch are
    below each other alone, root ports at a root, and nothing of PCIe is below conventional PCI."""
    if above in ("pcie.0", "pxb-pcie"):
        return "pcie-root-port" if model in (_SWITCH, "xio3130-downstream") else model
    if above == _SWITCH:
        return "xio3130-downstream" if model in ("pcie-root-port", _SWITCH) else model
    if above in _LINKS:
        return "pcie-pci-bridge" if model in _LINKS else model
    return "pci-bridge" if model in _EXPRESS else model


def _slots_below(making: _Making, one: TwinFunction, model: str) -> dict[int, list[TwinFunction]]:
    """What is in each slot below a bridge of QEMU's `model`."""
    slots = _by_slot(making.children.get(one.address, []))
    if model not in _LINKS or not slots:
        return slots
    first, *others = sorted(slots)
    if first:
        names = ", ".join(far.address for far in slots[first])
        making.lack("slot", f"{names}: in slot 00, below a port there is no other")
    for slot in others:
        names = ", ".join(far.address for far in slots[slot])
        making.lack("no-room", f"{names}: left out, below a port there is slot 00 alone")
    return {0: slots[first]}


def _place_endpoint(
    making: _Making, one: TwinFunction, properties: tuple[tuple[str, str], ...]
) -> None:
    kind = making.stand_ins.get(one.address)
    if kind is None or kind == "nvme":
        pin = one.driver is None or one.vendor << 16 | one.device not in _BROKEN_INTX
        making.items.append(Replay(one, properties, disk=kind == "nvme", pin=pin))
        if not pin:
            making.lack("pin", f"{one.address}: it has no interrupt pin in the twin")
        if kind == "nvme":
            making.used[one.address] = kind
        if one.vfs:
            making.lack(
                "virtual-functions",
                f"{one.address}: its {one.vfs} virtual functions cannot be made in the twin",
            )
        return
    stand_in = _sata(making, properties) if kind == "sata" else _card(making, kind, properties)
    making.items += stand_in
    making.used[one.address] = kind
    making.lack(
        "stand-in",
        f"{one.address}: QEMU's {stand_in[0].model} stands in for {one.ids}, so that a driver"
        " works on it",
    )
    if kind == "sriov" and one.vfs > _VFS:
        making.lack(
            "virtual-functions",
            f"{one.address}: {_VFS} virtual functions at most, the original has {one.vfs}",
        )


def _sata(making: _Making, properties: tuple[tuple[str, str], ...]) -> list[DeviceModel]:
    drive, name = f"twin{len(making.disks)}", f"sata{len(making.disks)}"
    making.disks.append(Disk(drive))
    return [
        DeviceModel("ich9-ahci", (("id", name), *properties)),
        DeviceModel("ide-hd", (("bus", f"{name}.0"), ("drive", drive))),
    ]


def _card(
    making: _Making, kind: StandIn, properties: tuple[tuple[str, str], ...]
) -> list[DeviceModel]:
    name = f"twin{len(making.networks)}"
    making.networks.append(name)
    mac = f"52:54:00:7a:00:{len(making.networks):02x}"
    model = "igb" if kind == "sriov" else "e1000e"
    return [DeviceModel(model, (("netdev", name), ("mac", mac), ("romfile", ""), *properties))]
