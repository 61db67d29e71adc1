"""Configuration space decoded: the header and every capability, with bounds on all of it.

What a device puts there is not to be trusted: lists can loop, pointers can lead anywhere, lengths
can be absurd. Nothing here raises for any content; what is out of bounds is left out and named in
`ConfigSpace.problems`.

Sources: PCI Local Bus Specification 3.0, 6.7; PCI Express Base Specification 6.0, 7.5 and 7.6;
drivers/pci/pci.c, __pci_find_next_cap_ttl; drivers/pci/pci-sysfs.c, pci_read_config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

from vfiotool.devices.config import extended as extended
from vfiotool.devices.config import standard as standard
from vfiotool.devices.config.express import (
    EVENT_COLLECTOR,
    PCIE_SIZE,
    ROOT_PORT,
    decode_pcie,
    port_type,
)
from vfiotool.devices.config.header import Header, decode_header
from vfiotool.devices.config.layout import Fields, Value, read_registers, u16, u32
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

# drivers/pci/pci.c, PCI_FIND_CAP_TTL.
STANDARD_HOPS = 48
# Each capability takes at least eight bytes: include/uapi/linux/pci_regs.h, PCI_EXT_CAP_*.
EXTENDED_HOPS = (4096 - 256) // 8
HEADER_BYTES = 64
# The whole of it (PCI Express Base Specification 6.0, 7.2).
CONFIG_BYTES = 4096
_EXTENDED_START = 0x100
# So many results are kept: there are fewer kinds of functions than functions.
SPACES_KEPT, CAPABILITIES_KEPT = 512, 4096
_PCIX, _PCIE, _EA, _AER = 0x07, 0x10, 0x14, 0x0001

S = TypeVar("S")
T = TypeVar("T")
_Decoder = Callable[[bytes], Fields]
# id: (bytes that the decoder looks at, decoder).
_STANDARD: dict[int, tuple[int, _Decoder]] = {
    0x01: (8, standard.decode_pm),
    0x02: (12, standard.decode_agp),
    0x03: (4, standard.decode_vpd),
    0x04: (4, standard.decode_slot_id),
    0x05: (24, standard.decode_msi),
    _PCIX: (8, standard.decode_pcix),
    0x08: (4, standard.decode_ht),
    0x09: (192, standard.decode_vendor),
    0x0A: (4, standard.decode_debug_port),
    0x0D: (8, standard.decode_subsystem),
    0x0E: (12, standard.decode_agp),
    _PCIE: (PCIE_SIZE, decode_pcie),
    0x11: (12, standard.decode_msix),
    0x12: (8, standard.decode_sata),
    0x13: (6, standard.decode_af),
    _EA: (192, standard.decode_ea),
    0x15: (8, standard.decode_fpb),
}
_EXTENDED: dict[int, tuple[int, _Decoder]] = {
    _AER: (44, extended.decode_aer),
    0x0002: (112, extended.decode_vc),
    0x0003: (12, extended.decode_dsn),
    0x0009: (112, extended.decode_vc),
    0x000B: (8, extended.decode_vsec),
    0x0010: (64, extended.decode_sriov),
    0x0012: (48, extended.decode_multicast),
    0x0015: (52, extended.decode_rebar),
    0x0018: (8, extended.decode_ltr),
    0x0019: (12, extended.decode_secondary),
    0x001E: (16, extended.decode_l1_pm),
    0x0023: (10, extended.decode_dvsec),
    0x0024: (52, extended.decode_rebar),
    **{
        id_: (16, partial(read_registers, registers))
        for id_, registers in extended.EXTENDED_REGISTERS.items()
    },
}
_AER_ROOT: tuple[int, _Decoder] = (56, extended.decode_aer_root)
_UNKNOWN: tuple[int, None] = (0, None)


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability. `fields` holds its registers decoded, empty where only the name is known.

    `version` is that of an extended capability's header, None for a standard one. A field is None
    where the readable part of configuration space ends before it.
    """

    id: int
    offset: int
    extended: bool
    version: int | None
    name: str
    title: str
    fields: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """What could be read of a function's configuration space.

    `size` is in bytes: 4096 or 256, and 64 for a reader without CAP_SYS_ADMIN, whom the kernel
    shows the header alone; `complete` tells whether capabilities could be looked for at all.
    `problems` names what is wrong with the capability lists.
    """

    size: int
    complete: bool
    header: Header | None
    capabilities: tuple[Capability, ...]
    problems: tuple[str, ...]

    def find(self, name: str) -> Capability | None:
        """The first capability of this name (`"pcie"`, `"sriov"`), or None."""
        return next((item for item in self.capabilities if item.name == name), None)

    @property
    def serial(self) -> str | None:
        """The device serial number capability's number (`"00-1a-11-ff-fe-4c-3c-70"`), or None.

        All ones are no number: the device does not answer, or its maker has written none.
        """
        capability = self.find("dsn")
        value = None if capability is None else capability.fields.get("serial")
        return value if isinstance(value, str) and value.strip("f-") else None


class Once(Generic[S, T]):
    """What a function makes of configuration spaces or capabilities, each asked of once.

    By identity: `parse_config` gives the same objects for the same bytes, and they are kept here
    so that no other can take the place of one.
    """

    def __init__(self, make: Callable[[S], T], kept: int) -> None:
        self._make = make
        self._kept = kept
        self._known: dict[int, tuple[S, T]] = {}

    def __call__(self, item: S) -> T:
        known = self._known.get(id(item))
        if known is None:
            if len(self._known) >= self._kept:
                self._known.clear()
            known = self._known[id(item)] = (item, self._make(item))
        return known[1]


def read_config(host: Host, address: str) -> ConfigSpace | None:
    """A function's configuration space, or None if there is none to read (gone, or no such file).

    Reading wakes a suspended device up for a moment, as lspci does.
    """
    try:
        data = host.read_at(f"{SYS_PCI_DEVICES}/{address}/config", 0, CONFIG_BYTES)
    except OSError:
        return None
    return parse_config(data)


# The VFs of a physical function often have the very same bytes there: decode those once.
@lru_cache(maxsize=SPACES_KEPT)
def parse_config(data: bytes) -> ConfigSpace:
    """Decode up to 4096 bytes of configuration space; never raises, whatever they hold."""
    data = data[:CONFIG_BYTES]
    problems: list[str] = []
    if len(data) < HEADER_BYTES:
        return ConfigSpace(len(data), False, None, (), ("shorter than a header",))
    # The ids alone do not tell: a VF's are ffff by definition (SR-IOV 1.1, 3.4.1.1 and 3.4.1.2).
    if data[:HEADER_BYTES] == b"\xff" * HEADER_BYTES:
        return ConfigSpace(len(data), False, None, (), ("the device does not answer",))
    header = decode_header(data)
    found = _walk_standard(data, header, problems)
    kind = next((port_type(u16(data, at + 2)) for id_, at in found if id_ == _PCIE), -1)
    bridge = header.layout == "bridge"
    capabilities = [
        _standard_capability(
            id_, at, data[at : min(at + _STANDARD.get(id_, _UNKNOWN)[0], 256)], bridge
        )
        for id_, at in found
    ]
    # Conventional functions have none; a host bridge's 4096 bytes can hold anything there.
    if len(data) > _EXTENDED_START and any(id_ in (_PCIE, _PCIX) for id_, _ in found):
        root = kind in (ROOT_PORT, EVENT_COLLECTOR)
        capabilities += [
            _extended_capability(
                head, at, data[at : at + _decoder_of(head & 0xFFFF, root)[0]], root
            )
            for head, at in _walk_extended(data, problems)
        ]
    complete = len(data) > HEADER_BYTES or not header.status["capability_list"]
    return ConfigSpace(len(data), complete, header, tuple(capabilities), tuple(problems))


def _walk_standard(data: bytes, header: Header, problems: list[str]) -> list[tuple[int, int]]:
    """The id and offset of each standard capability in the list's order."""
    if not header.status["capability_list"] or len(data) <= HEADER_BYTES:
        return []
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    at = data[0x14 if header.layout == "cardbus" else 0x34] & ~3
    while at and len(found) < STANDARD_HOPS:
        if at < HEADER_BYTES or at + 4 > len(data):
            problems.append(f"a capability pointer leads to {at:#04x}, out of bounds")
            return found
        if at in seen:
            problems.append(f"the capability list loops at {at:#04x}")
            return found
        seen.add(at)
        if data[at] == 0xFF:
            problems.append(f"the capability list is broken at {at:#04x}")
            return found
        found.append((data[at], at))
        at = data[at + 1] & ~3
    if at:
        problems.append(f"more than {STANDARD_HOPS} capabilities")
    return found


def _walk_extended(data: bytes, problems: list[str]) -> list[tuple[int, int]]:
    """The header word and offset of each extended capability in the list's order."""
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    at = _EXTENDED_START
    while at and len(found) < EXTENDED_HOPS:
        if at < _EXTENDED_START or at + 4 > len(data):
            problems.append(f"an extended capability pointer leads to {at:#05x}, out of bounds")
            return found
        if at in seen:
            problems.append(f"the extended capability list loops at {at:#05x}")
            return found
        seen.add(at)
        head = u32(data, at)
        if head in (0, 0xFFFFFFFF):
            return found
        found.append((head, at))
        at = head >> 20 & ~3
    return found


# Functions of one kind share most of their capabilities byte for byte.
@lru_cache(maxsize=CAPABILITIES_KEPT)
def _standard_capability(id_: int, at: int, body: bytes, bridge: bool) -> Capability:
    _, decoder = _STANDARD.get(id_, _UNKNOWN)
    if id_ == _EA and bridge:
        decoder = standard.decode_ea_bridge
    name, title = standard.STANDARD_NAMES.get(id_, (f"unknown-{id_:02x}", f"Unknown {id_:02x}"))
    fields = {} if decoder is None else decoder(body)
    return Capability(id_, at, False, None, name, title, fields)


@lru_cache(maxsize=CAPABILITIES_KEPT)
def _extended_capability(head: int, at: int, body: bytes, root: bool) -> Capability:
    id_ = head & 0xFFFF
    _, decoder = _decoder_of(id_, root)
    name, title = extended.EXTENDED_NAMES.get(id_, (f"unknown-{id_:04x}", f"Unknown {id_:04x}"))
    fields = {} if decoder is None else decoder(body)
    return Capability(id_, at, True, head >> 16 & 0xF, name, title, fields)


def _decoder_of(id_: int, root: bool) -> tuple[int, _Decoder | None]:
    """How an extended capability is decoded, below a root port or event collector or elsewhere."""
    return _AER_ROOT if root and id_ == _AER else _EXTENDED.get(id_, _UNKNOWN)
