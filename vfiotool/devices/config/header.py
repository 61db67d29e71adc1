"""The first 64 bytes of configuration space, which every reader may see.

Source: PCI Express Base Specification 6.0, 7.5.1; include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vfiotool.devices.config.layout import Fields, bits, read_register, register, u16

LAYOUTS = {0: "device", 1: "bridge", 2: "cardbus"}
_COMMAND = register(
    "command",
    4,
    2,
    "io@0 memory@1 bus_master@2 special_cycles@3 write_invalidate@4 vga_snoop@5 parity@6 "
    "stepping@7 serr@8 fast_back_to_back@9 intx_disable@10",
)
_STATUS = register(
    "status",
    6,
    2,
    "immediate_readiness@0 intx@3 capability_list@4 66mhz@5 user_features@6 fast_back_to_back@7 "
    "parity@8 devsel@9-10 signalled_target_abort@11 received_target_abort@12 "
    "received_master_abort@13 system_error@14 detected_parity@15",
)
_BRIDGE_CONTROL = register(
    "bridge_control",
    0x3E,
    2,
    "parity@0 serr@1 isa@2 vga@3 vga_16bit@4 master_abort@5 secondary_reset@6 "
    "fast_back_to_back@7 primary_discard_timer@8 secondary_discard_timer@9 "
    "discard_timer_status@10 discard_timer_serr@11",
)


@dataclass(frozen=True, slots=True)
class Header:
    """The type-independent part of a header and, for a bridge, its bus numbers and control.

    `layout` is `device`, `bridge`, `cardbus` or `unknown-NN`. `interrupt_pin` is `"A"` to `"D"`;
    `cache_line_bytes` and `latency_timer` are as the registers say.
    """

    vendor: str
    device: str
    revision: str
    class_code: str
    layout: str
    multi_function: bool
    command: Fields
    status: Fields
    cache_line_bytes: int
    latency_timer: int
    interrupt_pin: str | None
    interrupt_line: int
    bus: Fields | None
    bridge_control: Fields | None


def decode_header(data: bytes) -> Header:
    """Decode the first 64 bytes of configuration space (at least so many must be given)."""
    kind = data[0x0E] & 0x7F
    layout = LAYOUTS.get(kind, f"unknown-{kind:02x}")
    pin = data[0x3D]
    bus: Fields | None = None
    control: Fields | None = None
    if layout in ("bridge", "cardbus"):
        bus = {"primary": data[0x18], "secondary": data[0x19], "subordinate": data[0x1A]}
    if layout == "bridge":
        control = _flags(read_register(_BRIDGE_CONTROL, data))
    command, status = _command_and_status(data[:8])
    return Header(
        vendor=f"{u16(data, 0):04x}",
        device=f"{u16(data, 2):04x}",
        revision=f"{data[8]:02x}",
        class_code=data[9:12][::-1].hex(),
        layout=layout,
        multi_function=bool(data[0x0E] & 0x80),
        command=command,
        status=status,
        cache_line_bytes=data[0x0C] * 4,
        latency_timer=bits(data[0x0D], 0, 7),
        interrupt_pin="ABCD"[pin - 1] if 1 <= pin <= 4 else None,
        interrupt_line=data[0x3C],
        bus=bus,
        bridge_control=control,
    )


@lru_cache(maxsize=512)
def _command_and_status(data: bytes) -> tuple[Fields, Fields]:
    return _flags(read_register(_COMMAND, data)), _flags(read_register(_STATUS, data))


def _flags(value: object) -> Fields:
    assert isinstance(value, dict)
    return value
