"""The capabilities of the first 256 bytes but PCI Express itself.

Sources: PCI Local Bus Specification 3.0 and the ECNs named at each layout;
include/uapi/linux/pci_regs.h, PCI_CAP_ID_*.
"""

from __future__ import annotations

from vfiotool.devices.config.layout import Fields, Value, bits, read_registers, register, u16, u32

# id: (name, title). PCI Code and ID Assignment Specification 1.14, section 2.
STANDARD_NAMES = {
    0x00: ("null", "Null"),
    0x01: ("pm", "Power Management"),
    0x02: ("agp", "Accelerated Graphics Port"),
    0x03: ("vpd", "Vital Product Data"),
    0x04: ("slot-id", "Slot Identification"),
    0x05: ("msi", "Message Signalled Interrupts"),
    0x06: ("compact-pci-hot-swap", "CompactPCI Hot Swap"),
    0x07: ("pci-x", "PCI-X"),
    0x08: ("hypertransport", "HyperTransport"),
    0x09: ("vendor", "Vendor Specific"),
    0x0A: ("debug-port", "Debug Port"),
    0x0B: ("compact-pci-crc", "CompactPCI Central Resource Control"),
    0x0C: ("hot-plug", "PCI Hot-Plug"),
    0x0D: ("subsystem", "Bridge Subsystem Identification"),
    0x0E: ("agp-8x", "AGP 8x"),
    0x0F: ("secure", "Secure Device"),
    0x10: ("pcie", "PCI Express"),
    0x11: ("msi-x", "MSI-X"),
    0x12: ("sata", "SATA Data/Index"),
    0x13: ("af", "Advanced Features"),
    0x14: ("ea", "Enhanced Allocation"),
    0x15: ("fpb", "Flattening Portal Bridge"),
}

_AUX_CURRENT_MA = (0, 55, 100, 160, 220, 270, 320, 375)
_PME_STATES = ("D0", "D1", "D2", "D3hot", "D3cold")
# HyperTransport I/O Link Specification 3.10, 7.: the upper five bits of the command word.
_HT_TYPES = {
    0x08: "switch",
    0x10: "interrupt-discovery",
    0x11: "revision",
    0x12: "unit-id-clumping",
    0x13: "extended-config",
    0x14: "address-mapping",
    0x15: "msi-mapping",
    0x16: "direct-route",
    0x17: "vc-set",
    0x18: "retry-mode",
    0x19: "x86",
}

_PM = (
    register(
        "",
        2,
        2,
        "version@0-2 pme_clock@3 immediate_readiness@4 device_specific_init@5 d1@9 d2@10",
    ),
    register(
        "",
        4,
        2,
        "power_state@0-1 no_soft_reset@3 pme_enable@8 data_select@9-12 data_scale@13-14 "
        "pme_status@15",
    ),
    register("", 6, 1, "bridge_b2@6 bridge_clock_control@7"),
)
_AGP_STATUS = register("status", 4, 4, "request_depth@24-31/plus1 sideband@9 gart64@7 fast_write@4")
_PCIX = (register("status", 4, 4, "function@0-2 device@3-7 bus@8-15 64bit@16 133mhz@17"),)
_FPB = (register("", 4, 4, "rid@0 mem_low@1 mem_high@2 vectors@3-5"),)


def decode_pm(body: bytes) -> Fields:
    """PCI Bus Power Management Interface Specification 1.2, 3.2."""
    fields = read_registers(_PM, body)
    capabilities = u16(body, 2)
    fields["aux_current_ma"] = _AUX_CURRENT_MA[bits(capabilities, 6, 8)]
    fields["pme_from"] = [
        name for bit, name in enumerate(_PME_STATES) if capabilities >> 11 + bit & 1
    ]
    state = fields["power_state"]
    fields["power_state"] = None if state is None else f"D{state}".replace("D3", "D3hot")
    return fields


def decode_msi(body: bytes) -> Fields:
    """PCI Local Bus Specification 3.0, 6.8.1; per-vector masking included."""
    control = u16(body, 2)
    wide, maskable = bool(control & 0x80), bool(control & 0x100)
    data_at = 12 if wide else 8
    mask_at = 16 if wide else 12
    whole = len(body) >= data_at + 2
    masked = maskable and len(body) >= mask_at + 8
    return {
        "enabled": bool(control & 1),
        "vectors": 1 << bits(control, 1, 3),
        "vectors_enabled": 1 << bits(control, 4, 6),
        "64bit": wide,
        "maskable": maskable,
        "address": (u32(body, 4) | (u32(body, 8) << 32 if wide else 0)) if whole else None,
        "data": u16(body, data_at) if whole else None,
        "mask": u32(body, mask_at) if masked else None,
        "pending": u32(body, mask_at + 4) if masked else None,
    }


def decode_msix(body: bytes) -> Fields:
    """PCI Local Bus Specification 3.0, 6.8.2. Offsets are in bytes from the start of the BAR."""
    control = u16(body, 2)
    fields: Fields = {
        "enabled": bool(control & 0x8000),
        "masked": bool(control & 0x4000),
        "vectors": bits(control, 0, 10) + 1,
    }
    for name, offset in (("table", 4), ("pba", 8)):
        place = u32(body, offset) if len(body) >= offset + 4 else None
        fields[f"{name}_bar"] = None if place is None else place & 7
        fields[f"{name}_offset"] = None if place is None else place & ~7
    return fields


def decode_vpd(body: bytes) -> Fields:
    """PCI Local Bus Specification 3.0, appendix I: the window, not what is behind it."""
    word = u16(body, 2)
    return {"address": bits(word, 0, 14), "done": bool(word & 0x8000)}


def decode_vendor(body: bytes) -> Fields:
    """The length that the vendor gives, in bytes, and the bytes after it."""
    length = body[2] if len(body) > 2 else 0
    return {"length": length, "data": body[3:length].hex() if length > 3 else ""}


def decode_subsystem(body: bytes) -> Fields:
    """PCI-to-PCI Bridge Architecture Specification 1.2, 3.2.5.14."""
    if len(body) < 8:
        return {"subsystem_vendor": None, "subsystem_device": None}
    return {"subsystem_vendor": f"{u16(body, 4):04x}", "subsystem_device": f"{u16(body, 6):04x}"}


def decode_debug_port(body: bytes) -> Fields:
    """Enhanced Host Controller Interface 1.0, appendix C.2."""
    word = u16(body, 2)
    return {"bar": bits(word, 13, 15), "offset": bits(word, 0, 12)}


def decode_slot_id(body: bytes) -> Fields:
    """PCI-to-PCI Bridge Architecture Specification 1.2, 13.4."""
    word = u16(body, 2)
    return {"slots": bits(word, 0, 4), "first": bool(word & 0x20), "chassis": bits(word, 8, 15)}


def decode_ht(body: bytes) -> Fields:
    """The kind of a HyperTransport capability; the MSI mapping's window as well."""
    command = u16(body, 2)
    kind = bits(command, 11, 15)
    # Slave/primary and host/secondary use the upper three bits alone.
    name = {0: "slave", 4: "host"}.get(kind & 0x1C) if kind < 8 else _HT_TYPES.get(kind)
    fields: Fields = {"kind": name or f"unknown-{kind:02x}"}
    if kind == 0x15:
        fields["enabled"] = bool(command & 1)
        fields["fixed"] = bool(command & 2)
    return fields


def decode_sata(body: bytes) -> Fields:
    """Serial ATA AHCI 1.3.1, 2.4. `bar` None: index and data registers are in config space."""
    word = u16(body, 2)
    place = u32(body, 4) if len(body) >= 8 else None
    where = None if place is None else place & 0xF
    return {
        "version": f"{bits(word, 4, 7)}.{bits(word, 0, 3)}",
        "bar": where - 4 if where is not None and 4 <= where <= 9 else None,
        "offset": None if place is None else bits(place, 4, 23) * 4,
    }


def decode_af(body: bytes) -> Fields:
    """PCI Advanced Capabilities ECN for conventional PCI."""
    capabilities = body[3] if len(body) > 3 else 0
    return {
        "transactions_pending": bool(capabilities & 1),
        "flr": bool(capabilities & 2),
        "pending": bool(body[5] & 1) if len(body) > 5 else None,
    }


def decode_agp(body: bytes) -> Fields:
    """AGP Specification 3.0, 6.2."""
    revision = body[2] if len(body) > 2 else 0
    fields: Fields = {"version": f"{revision >> 4}.{revision & 0xF}"}
    fields.update(read_registers((_AGP_STATUS,), body))
    return fields


def decode_pcix(body: bytes) -> Fields:
    """PCI-X Protocol Addendum 2.0, 2.6."""
    return read_registers(_PCIX, body)


def decode_fpb(body: bytes) -> Fields:
    """PCI Express Base Specification 6.0, 7.8.11."""
    return read_registers(_FPB, body)


def decode_ea(body: bytes) -> Fields:
    """PCI Express Base Specification 6.0, 7.8.5: each entry's BAR, window and properties."""
    count = body[2] & 0x3F if len(body) > 2 else 0
    entries: list[Value] = []
    # A type 1 header's entries begin after its fixed bus numbers; decode_ea_bridge moves them.
    offset = 4
    for _ in range(count):
        if offset + 12 > len(body):
            break
        entries.append(_ea_entry(body, offset))
        offset += 4 + 4 * (u32(body, offset) & 7)
    return {"count": count, "entries": entries}


def decode_ea_bridge(body: bytes) -> Fields:
    """As `decode_ea`, for a bridge (7.8.5.2)."""
    fields = decode_ea(body[:4] + body[8:])
    fields["secondary"] = body[4] if len(body) > 4 else None
    fields["subordinate"] = body[5] if len(body) > 5 else None
    return fields


def _ea_entry(body: bytes, offset: int) -> Value:
    head, base, limit = u32(body, offset), u32(body, offset + 4), u32(body, offset + 8)
    after = offset + 12
    start = base & ~3
    if base & 2:
        start |= u32(body, after) << 32
        after += 4
    max_offset = limit | 3
    if limit & 2:
        max_offset |= u32(body, after) << 32
    return {
        "enabled": bool(head >> 31),
        "writable": bool(head >> 30 & 1),
        "bar_indicator": bits(head, 4, 7),
        "primary_properties": bits(head, 8, 15),
        "secondary_properties": bits(head, 16, 23),
        "start": start,
        "size": max_offset + 1,
    }
