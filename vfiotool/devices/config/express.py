"""The PCI Express capability (id 10h).

Source: PCI Express Base Specification 6.0, 7.5.3; include/uapi/linux/pci_regs.h, PCI_EXP_*.
"""

from __future__ import annotations

from vfiotool.devices.config.layout import (
    ConfigRegister,
    Fields,
    Value,
    bits,
    power_limit_w,
    read_register,
    register,
    u16,
    u32,
)

PCIE_SIZE = 60

# Device/Port Type, 7.5.3.2.
ENDPOINT, LEGACY_ENDPOINT, ROOT_PORT, UPSTREAM, DOWNSTREAM = 0, 1, 4, 5, 6
PCIE_TO_PCI, PCI_TO_PCIE, INTEGRATED_ENDPOINT, EVENT_COLLECTOR = 7, 8, 9, 10
PORT_TYPES = {
    ENDPOINT: "endpoint",
    LEGACY_ENDPOINT: "legacy-endpoint",
    ROOT_PORT: "root-port",
    UPSTREAM: "upstream-port",
    DOWNSTREAM: "downstream-port",
    PCIE_TO_PCI: "pcie-to-pci-bridge",
    PCI_TO_PCIE: "pci-to-pcie-bridge",
    INTEGRATED_ENDPOINT: "integrated-endpoint",
    EVENT_COLLECTOR: "event-collector",
}

_DEVICE = (
    register(
        "device_capabilities",
        4,
        4,
        "max_payload_bytes@0-2/payload phantom_functions@3-4 extended_tag@5 "
        "l0s_latency_ns@6-8/l0s l1_latency_ns@9-11/l1 attention_button@12 "
        "attention_indicator@13 power_indicator@14 role_based_error_reporting@15 flr@28",
    ),
    register(
        "device_control",
        8,
        2,
        "correctable_errors@0 non_fatal_errors@1 fatal_errors@2 unsupported_requests@3 "
        "relaxed_ordering@4 max_payload_bytes@5-7/payload extended_tag@8 phantom_functions@9 "
        "aux_power@10 no_snoop@11 max_read_request_bytes@12-14/payload bridge_retry_or_flr@15",
    ),
    register(
        "device_status",
        10,
        2,
        "correctable_error@0 non_fatal_error@1 fatal_error@2 unsupported_request@3 aux_power@4 "
        "transactions_pending@5",
    ),
)
_LINK = (
    register(
        "link_capabilities",
        12,
        4,
        "max_speed_gts@0-3/speed max_width@4-9 aspm@10-11/aspm l0s_exit_latency_ns@12-14/l0s "
        "l1_exit_latency_ns@15-17/l1 clock_power_management@18 surprise_down_reporting@19 "
        "active_reporting@20 bandwidth_notification@21 aspm_optionality@22 port@24-31",
    ),
    register(
        "link_control",
        16,
        2,
        "aspm@0-1/aspm read_completion_boundary_128@3 disabled@4 retrain@5 common_clock@6 "
        "extended_synch@7 clock_power_management@8 autonomous_width_disable@9 "
        "bandwidth_interrupt@10 autonomous_bandwidth_interrupt@11",
    ),
    register(
        "link_status",
        18,
        2,
        "speed_gts@0-3/speed width@4-9 training_error@10 training@11 slot_clock@12 active@13 "
        "bandwidth_management@14 autonomous_bandwidth@15",
    ),
)
_SLOT = (
    register(
        "slot_capabilities",
        20,
        4,
        "attention_button@0 power_controller@1 mrl_sensor@2 attention_indicator@3 "
        "power_indicator@4 hot_plug_surprise@5 hot_plug@6 interlock@17 "
        "no_command_completed@18 slot@19-31",
    ),
    register(
        "slot_control",
        24,
        2,
        "attention_button@0 power_fault@1 mrl_sensor@2 presence_detect@3 command_completed@4 "
        "hot_plug_interrupt@5 attention_indicator@6-7/indicator power_indicator@8-9/indicator "
        "power_off@10 interlock@11 link_state@12",
    ),
    register(
        "slot_status",
        26,
        2,
        "attention_button@0 power_fault@1 mrl_changed@2 presence_changed@3 command_completed@4 "
        "mrl_open@5 present@6 interlock@7 link_changed@8",
    ),
)
_ROOT = (
    register(
        "root_control",
        28,
        2,
        "correctable_errors@0 non_fatal_errors@1 fatal_errors@2 pme_interrupt@3 crs_visible@4",
    ),
    register("root_capabilities", 30, 2, "crs_visible@0"),
    register("root_status", 32, 4, "pme_requester@0-15/hex4 pme@16 pme_pending@17"),
)
_DEVICE2 = (
    register(
        "device_capabilities_2",
        36,
        4,
        "completion_timeout_ranges@0-3 completion_timeout_disable@4 ari_forwarding@5 "
        "atomic_routing@6 atomic_32@7 atomic_64@8 atomic_cas_128@9 no_relaxed_ordering_p2p@10 "
        "ltr@11 tph_completer@12-13 ln_system_cls@14-15 ten_bit_tag_completer@16 "
        "ten_bit_tag_requester@17 obff@18-19 extended_format@20 end_end_tlp_prefix@21 "
        "max_end_end_tlp_prefixes@22-23 emergency_power_reduction@24-25 "
        "emergency_power_reduction_init@26 frs@31",
    ),
    register(
        "device_control_2",
        40,
        2,
        "completion_timeout@0-3 completion_timeout_disable@4 ari_forwarding@5 "
        "atomic_requester@6 atomic_egress_block@7 ido_request@8 ido_completion@9 ltr@10 "
        "emergency_power_reduction@11 ten_bit_tag_requester@12 obff@13-14 "
        "end_end_tlp_prefix_block@15",
    ),
)
_LINK2 = (
    register(
        "link_capabilities_2",
        44,
        4,
        "crosslink@8 retimer@23 two_retimers@24 drs@31",
    ),
    register(
        "link_control_2",
        48,
        2,
        "target_speed_gts@0-3/speed enter_compliance@4 autonomous_speed_disable@5 "
        "selectable_deemphasis@6 transmit_margin@7-9 enter_modified_compliance@10 "
        "compliance_sos@11 compliance_preset@12-15",
    ),
    register(
        "link_status_2",
        50,
        2,
        "deemphasis_3_5db@0 equalization_complete@1 equalization_phase1@2 "
        "equalization_phase2@3 equalization_phase3@4 equalization_request@5 retimer@6 "
        "two_retimers@7 crosslink_resolution@8-9 downstream_component@12-14 drs@15",
    ),
)


def port_type(flags: int) -> int:
    """The device/port type of the capability's flags register."""
    return bits(flags, 4, 7)


def decode_pcie(body: bytes) -> Fields:
    """All registers that this type and version of function has (7.5.3, table of figure 7-10)."""
    flags = u16(body, 2)
    kind, version = port_type(flags), flags & 0xF
    slot = bool(flags & 0x100) and kind in (ROOT_PORT, DOWNSTREAM, PCI_TO_PCIE)
    link = kind not in (INTEGRATED_ENDPOINT, EVENT_COLLECTOR)
    fields: Fields = {
        "version": version,
        "port_type": PORT_TYPES.get(kind, f"unknown-{kind}"),
        "slot_implemented": slot,
        "interrupt_message": bits(flags, 9, 13),
    }
    specs: tuple[ConfigRegister, ...] = _DEVICE
    specs += _LINK if link else ()
    specs += _SLOT if slot else ()
    specs += _ROOT if kind in (ROOT_PORT, EVENT_COLLECTOR) else ()
    if version >= 2:
        specs += _DEVICE2
        specs += _LINK2 if link else ()
    for spec in specs:
        fields[spec.name] = read_register(spec, body)
    _add_power(
        fields, "device_capabilities", body, 4, 18, kind in (ENDPOINT, UPSTREAM, PCIE_TO_PCI)
    )
    _add_power(fields, "slot_capabilities", body, 20, 7, slot)
    _add_speeds(fields, body)
    return fields


def _add_power(
    fields: Fields, name: str, body: bytes, offset: int, low: int, has_limit: bool
) -> None:
    """The slot power limit: eight bits of value, then two of scale, from bit `low` on."""
    target: Value = fields.get(name)
    if isinstance(target, dict):
        value = u32(body, offset)
        limit = power_limit_w(bits(value, low, low + 7), bits(value, low + 8, low + 9))
        target["slot_power_limit_w"] = limit if has_limit else None


def _add_speeds(fields: Fields, body: bytes) -> None:
    target: Value = fields.get("link_capabilities_2")
    if isinstance(target, dict):
        vector = bits(u32(body, 44), 1, 7)
        speeds = (2.5, 5.0, 8.0, 16.0, 32.0, 64.0)
        target["speeds_gts"] = [speed for bit, speed in enumerate(speeds) if vector >> bit & 1]
