"""The extended capabilities, from offset 100h on.

Source: PCI Express Base Specification 6.0, 7.7 to 7.9; include/uapi/linux/pci_regs.h,
PCI_EXT_CAP_ID_*. Offsets are relative to the capability's header.
"""

from __future__ import annotations

from vfiotool.devices.config.layout import (
    ConfigRegister,
    Fields,
    Value,
    bits,
    ltr_ns,
    read_registers,
    register,
    u16,
    u32,
    u64,
)

# id: (name, title). PCI Code and ID Assignment Specification 1.14, section 3.
EXTENDED_NAMES = {
    0x0000: ("null", "Null"),
    0x0001: ("aer", "Advanced Error Reporting"),
    0x0002: ("vc", "Virtual Channel"),
    0x0003: ("dsn", "Device Serial Number"),
    0x0004: ("power-budgeting", "Power Budgeting"),
    0x0005: ("rc-link", "Root Complex Link Declaration"),
    0x0006: ("rc-internal-link", "Root Complex Internal Link Control"),
    0x0007: ("rcec", "Root Complex Event Collector Endpoint Association"),
    0x0008: ("mfvc", "Multi-Function Virtual Channel"),
    0x0009: ("vc", "Virtual Channel (with MFVC)"),
    0x000A: ("rcrb", "Root Complex Register Block"),
    0x000B: ("vsec", "Vendor-Specific"),
    0x000C: ("cac", "Configuration Access Correlation"),
    0x000D: ("acs", "Access Control Services"),
    0x000E: ("ari", "Alternative Routing-ID Interpretation"),
    0x000F: ("ats", "Address Translation Services"),
    0x0010: ("sriov", "Single Root I/O Virtualization"),
    0x0011: ("mriov", "Multi-Root I/O Virtualization"),
    0x0012: ("multicast", "Multicast"),
    0x0013: ("pri", "Page Request Interface"),
    0x0014: ("amd", "AMD Reserved"),
    0x0015: ("rebar", "Resizable BAR"),
    0x0016: ("dpa", "Dynamic Power Allocation"),
    0x0017: ("tph", "TPH Requester"),
    0x0018: ("ltr", "Latency Tolerance Reporting"),
    0x0019: ("secondary-pcie", "Secondary PCI Express"),
    0x001A: ("pmux", "Protocol Multiplexing"),
    0x001B: ("pasid", "Process Address Space ID"),
    0x001C: ("lnr", "LN Requester"),
    0x001D: ("dpc", "Downstream Port Containment"),
    0x001E: ("l1-pm", "L1 PM Substates"),
    0x001F: ("ptm", "Precision Time Measurement"),
    0x0020: ("m-pcie", "PCI Express over M-PHY"),
    0x0021: ("frs", "FRS Queueing"),
    0x0022: ("readiness", "Readiness Time Reporting"),
    0x0023: ("dvsec", "Designated Vendor-Specific"),
    0x0024: ("vf-rebar", "VF Resizable BAR"),
    0x0025: ("data-link-feature", "Data Link Feature"),
    0x0026: ("phy-16gt", "Physical Layer 16.0 GT/s"),
    0x0027: ("lane-margining", "Lane Margining at the Receiver"),
    0x0028: ("hierarchy-id", "Hierarchy ID"),
    0x0029: ("npem", "Native PCIe Enclosure Management"),
    0x002A: ("phy-32gt", "Physical Layer 32.0 GT/s"),
    0x002B: ("alternate-protocol", "Alternate Protocol"),
    0x002C: ("sfi", "System Firmware Intermediary"),
    0x002D: ("shadow-functions", "Shadow Functions"),
    0x002E: ("doe", "Data Object Exchange"),
    0x002F: ("device-3", "Device 3"),
    0x0030: ("ide", "Integrity and Data Encryption"),
    0x0031: ("phy-64gt", "Physical Layer 64.0 GT/s"),
    0x0032: ("flit-logging", "Flit Logging"),
    0x0033: ("flit-performance", "Flit Performance Measurement"),
    0x0034: ("flit-error-injection", "Flit Error Injection"),
}

_UNCORRECTABLE = (
    "data_link@4 surprise_down@5 poisoned_tlp@12 flow_control@13 completion_timeout@14 "
    "completer_abort@15 unexpected_completion@16 receiver_overflow@17 malformed_tlp@18 ecrc@19 "
    "unsupported_request@20 acs_violation@21 internal@22 mc_blocked@23 atomic_blocked@24 "
    "tlp_prefix_blocked@25 poisoned_tlp_blocked@26"
)
_CORRECTABLE = (
    "receiver@0 bad_tlp@6 bad_dllp@7 replay_rollover@8 replay_timeout@12 "
    "advisory_non_fatal@13 internal@14 header_log_overflow@15"
)
_AER = (
    register("uncorrectable_status", 4, 4, _UNCORRECTABLE),
    register("uncorrectable_mask", 8, 4, _UNCORRECTABLE),
    register("uncorrectable_severity", 12, 4, _UNCORRECTABLE),
    register("correctable_status", 16, 4, _CORRECTABLE),
    register("correctable_mask", 20, 4, _CORRECTABLE),
    register(
        "control",
        24,
        4,
        "first_error@0-4 ecrc_generation_capable@5 ecrc_generation@6 ecrc_check_capable@7 "
        "ecrc_check@8 multiple_headers_capable@9 multiple_headers@10 tlp_prefix_present@11 "
        "completion_timeout_log@12",
    ),
)
_AER_ROOT = (
    register("root_command", 44, 4, "correctable@0 non_fatal@1 fatal@2"),
    register(
        "root_status",
        48,
        4,
        "correctable@0 multiple_correctable@1 uncorrectable@2 multiple_uncorrectable@3 "
        "first_fatal@4 non_fatal@5 fatal@6 interrupt_message@27-31",
    ),
    register("source", 52, 4, "correctable@0-15/hex4 uncorrectable@16-31/hex4"),
)
_ACS_BITS = (
    "source_validation@0 translation_blocking@1 request_redirect@2 completion_redirect@3 "
    "upstream_forwarding@4 egress_control@5 direct_translated@6"
)
_SRIOV = (
    register("capabilities", 4, 4, "migration@0 ari_preserved@1 ten_bit_tag@2 message@21-31"),
    register(
        "control", 8, 2, "vfs@0 migration@1 migration_interrupt@2 memory@3 ari@4 ten_bit_tag@5"
    ),
    register("status", 10, 2, "migration@0"),
    register("initial_vfs", 12, 2, ""),
    register("total_vfs", 14, 2, ""),
    register("num_vfs", 16, 2, ""),
    register("function_dependency_link", 18, 1, ""),
    register("vf_offset", 20, 2, ""),
    register("vf_stride", 22, 2, ""),
    register("", 26, 2, "vf_device@0-15/hex4"),
    register("supported_page_sizes", 28, 4, ""),
    register("system_page_size", 32, 4, ""),
    register("migration_state_array", 60, 4, "bar@0-2 offset_8@3-31"),
)

# Capabilities that are registers and nothing else.
EXTENDED_REGISTERS: dict[int, tuple[ConfigRegister, ...]] = {
    0x000D: (
        register("capabilities", 4, 2, f"{_ACS_BITS} egress_vector_bits@8-15"),
        register("control", 6, 2, _ACS_BITS),
    ),
    0x000E: (
        register("capabilities", 4, 2, "mfvc_groups@0 acs_groups@1 next_function@8-15"),
        register("control", 6, 2, "mfvc_groups@0 acs_groups@1 function_group@4-6"),
    ),
    0x000F: (
        register("capabilities", 4, 2, "queue_depth@0-4 page_aligned@5 global_invalidate@6"),
        register("control", 6, 2, "smallest_unit@0-4 enabled@15"),
    ),
    0x0013: (
        register("control", 4, 2, "enabled@0 reset@1"),
        register(
            "status", 6, 2, "response_failure@0 unexpected_group@1 stopped@8 pasid_required@15"
        ),
        register("capacity", 8, 4, ""),
        register("allocation", 12, 4, ""),
    ),
    0x0017: (
        register(
            "",
            4,
            4,
            "no_table_mode@0 interrupt_vector_mode@1 device_specific_mode@2 extended_requester@8 "
            "table_location@9-10 table_size@16-26/plus1",
        ),
        register("control", 8, 4, "mode@0-2 requester@8-9"),
    ),
    0x001B: (
        register("capabilities", 4, 2, "execute@1 privileged@2 max_width@8-12"),
        register("control", 6, 2, "enabled@0 execute@1 privileged@2"),
    ),
    0x001D: (
        register(
            "capabilities",
            4,
            2,
            "interrupt_message@0-4 root_port_extensions@5 poisoned_tlp_blocking@6 "
            "software_trigger@7 pio_log_size@8-11 dl_active_error@12",
        ),
        register(
            "control",
            6,
            2,
            "trigger@0-1 completion_ur@2 interrupt@3 correctable_error@4 "
            "poisoned_tlp_blocking@5 software_trigger@6 dl_active_error@7",
        ),
        register(
            "status",
            8,
            2,
            "triggered@0 reason@1-2 interrupt@3 busy@4 reason_extension@5-6 pio_first_error@8-12",
        ),
        register("", 10, 2, "source@0-15/hex4"),
    ),
    0x001F: (
        register("capabilities", 4, 4, "requester@0 responder@1 root@2 granularity_ns@8-15/ns"),
        register("control", 8, 4, "enabled@0 root@1 granularity_ns@8-15/ns"),
    ),
    0x0025: (
        register("capabilities", 4, 4, "local_features@0-22 exchange_enable@31"),
        register("status", 8, 4, "remote_features@0-22 remote_valid@31"),
    ),
    0x002E: (
        register("capabilities", 4, 4, "interrupt@0 interrupt_message@1-11"),
        register("control", 8, 4, "interrupt@1"),
        register("status", 12, 4, "busy@0 interrupt@1 error@2 ready@31"),
    ),
}


def decode_aer(body: bytes) -> Fields:
    """7.8.4, without the registers of root ports."""
    fields = read_registers(_AER, body)
    log = [f"{u32(body, at):08x}" for at in range(28, 44, 4)]
    fields["header_log"] = list[Value](log) if len(body) >= 44 else None
    return fields


def decode_aer_root(body: bytes) -> Fields:
    """7.8.4 with 7.8.4.9 to 7.8.4.11: root ports and root complex event collectors."""
    return {**decode_aer(body), **read_registers(_AER_ROOT, body)}


def decode_dsn(body: bytes) -> Fields:
    """7.9.3. The serial number as an EUI-64, its most significant byte first."""
    if len(body) < 12:
        return {"serial": None}
    return {"serial": "-".join(f"{byte:02x}" for byte in reversed(body[4:12]))}


def decode_sriov(body: bytes) -> Fields:
    """Single Root I/O Virtualization and Sharing Specification 1.1, 3.3."""
    fields = read_registers(_SRIOV, body)
    fields["vf_bars"] = _vf_bars(body)
    return fields


def _vf_bars(body: bytes) -> list[Value]:
    bars: list[Value] = []
    index = 0
    while index < 6 and 40 + 4 * index <= len(body):
        low = u32(body, 36 + 4 * index)
        this = index
        index += 1
        if low in (0, 0xFFFFFFFF):
            continue
        wide = bits(low, 1, 2) == 2
        high = 0
        if wide:
            high = u32(body, 36 + 4 * index)
            index += 1
        bars.append(
            {
                "index": this,
                "start": low & ~0xF | high << 32,
                "bits": 64 if wide else 32,
                "prefetchable": bool(low & 8),
            }
        )
    return bars


def decode_rebar(body: bytes) -> Fields:
    """7.8.6 and 7.8.7. Sizes in bytes; an entry for each BAR that can be resized."""
    bars: list[Value] = []
    count = bits(u32(body, 8), 5, 7) if len(body) >= 12 else 0
    for at in range(4, 4 + 8 * min(count, 6), 8):
        if at + 8 > len(body):
            break
        control = u32(body, at + 4)
        code = bits(control, 8, 13)
        supported = u32(body, at) >> 4 | bits(control, 16, 31) << 28
        bars.append(
            {
                "bar": bits(control, 0, 2),
                "size": 1 << 20 + code if code <= 43 else None,
                "sizes": [1 << 20 + bit for bit in range(44) if supported >> bit & 1],
            }
        )
    return {"bars": bars}


def decode_ltr(body: bytes) -> Fields:
    """7.8.2."""
    whole = len(body) >= 8
    return {
        "max_snoop_ns": ltr_ns(u16(body, 4)) if whole else None,
        "max_no_snoop_ns": ltr_ns(u16(body, 6)) if whole else None,
    }


def decode_secondary(body: bytes) -> Fields:
    """7.7.3. `lane_errors` are the lanes' numbers."""
    fields = read_registers(
        (register("link_control_3", 4, 4, "perform_equalization@0 equalization_interrupt@1"),), body
    )
    errors = u32(body, 8) if len(body) >= 12 else None
    fields["lane_errors"] = (
        None if errors is None else [lane for lane in range(32) if errors >> lane & 1]
    )
    return fields


def decode_vsec(body: bytes) -> Fields:
    """7.9.5. `length` in bytes, the capability's header included."""
    if len(body) < 8:
        return {"id": None, "revision": None, "length": None}
    head = u32(body, 4)
    return {
        "id": f"{bits(head, 0, 15):04x}",
        "revision": bits(head, 16, 19),
        "length": bits(head, 20, 31),
    }


def decode_dvsec(body: bytes) -> Fields:
    """7.9.6."""
    if len(body) < 10:
        return {"vendor": None, "revision": None, "length": None, "id": None}
    head = u32(body, 4)
    return {
        "vendor": f"{bits(head, 0, 15):04x}",
        "revision": bits(head, 16, 19),
        "length": bits(head, 20, 31),
        "id": f"{u16(body, 8):04x}",
    }


_L1_BITS = "pci_pm_l1_2@0 pci_pm_l1_1@1 aspm_l1_2@2 aspm_l1_1@3"
_L1 = (
    register("capabilities", 4, 4, f"{_L1_BITS} supported@4 common_mode_restore_us@8-15"),
    register("control", 8, 4, f"{_L1_BITS} common_mode_restore_us@8-15"),
)


def decode_l1_pm(body: bytes) -> Fields:
    """7.8.3. Times in microseconds, the threshold in ns; None for reserved scales."""
    fields = read_registers(_L1, body)
    capabilities, control = fields["capabilities"], fields["control"]
    if isinstance(capabilities, dict):
        word = u32(body, 4)
        capabilities["power_on_us"] = _power_on_us(bits(word, 16, 17), bits(word, 19, 23))
    if isinstance(control, dict):
        word = u32(body, 8)
        scale = bits(word, 29, 31)
        threshold = bits(word, 16, 25) << 5 * scale
        control["ltr_threshold_ns"] = threshold if scale <= 5 else None
    word = u32(body, 12)
    power_on = _power_on_us(bits(word, 0, 1), bits(word, 3, 7)) if len(body) >= 16 else None
    fields["power_on_us"] = power_on
    return fields


def _power_on_us(scale: int, value: int) -> int | None:
    return None if scale == 3 else (2, 10, 100)[scale] * value


def decode_multicast(body: bytes) -> Fields:
    """7.9.11."""
    if len(body) < 48:
        return {"max_groups": None}
    capabilities, control, bar = u16(body, 4), u16(body, 6), u64(body, 8)
    return {
        "max_groups": bits(capabilities, 0, 5) + 1,
        "groups": bits(control, 0, 5) + 1,
        "enabled": bool(control & 0x8000),
        "index_position": bits(bar, 0, 5),
        "base": bar & ~0xFFF,
        "receive": f"{u64(body, 16):016x}",
        "block_all": f"{u64(body, 24):016x}",
        "block_untranslated": f"{u64(body, 32):016x}",
    }


def decode_vc(body: bytes) -> Fields:
    """7.9.1: the port's registers and each virtual channel's control and status."""
    if len(body) < 16:
        return {"channels": None}
    port = u32(body, 4)
    channels: list[Value] = []
    for index in range(bits(port, 0, 2) + 1):
        at = 16 + 12 * index
        if at + 12 > len(body):
            break
        control, status = u32(body, at + 4), u16(body, at + 10)
        channels.append(
            {
                "enabled": bool(control >> 31),
                "id": bits(control, 24, 26),
                "traffic_classes": f"{bits(control, 0, 7):02x}",
                "negotiation_pending": bool(status & 2),
            }
        )
    return {"low_priority": bits(port, 4, 6), "channels": channels}
