"""How each word that lspci prints of a capability maps to our fields (see lspci_oracle.py)."""

from __future__ import annotations

import re
from collections.abc import Callable

Rule = tuple[str, str, Callable[[str], object]]


def _hex(text: str) -> int:
    return int(text, 16)


def _ns(text: str) -> int | None:
    if text == "unlimited":
        return None
    number = int(re.sub(r"\D", "", text))
    return number * 1000 if text.endswith("us") else number


def _speed(text: str) -> float | None:
    return None if text.lower() == "unknown" else float(text.removesuffix("GT/s"))


def _aspm(text: str) -> list[str]:
    return re.findall(r"L0s|L1", text)


def _power(text: str) -> float | None:
    return None if text.startswith(">") else float(text.removesuffix("W"))


_SPEEDS: dict[str, object] = {"RsvdP": None, "Unknown": []} | {
    ("2.5GT/s" if top == 2.5 else f"2.5-{top:g}GT/s"): [s for s in (2.5, 5, 8, 16, 32) if s <= top]
    for top in (2.5, 5, 8, 16, 32)
}


def _table(*values: str | None) -> Callable[[str], int]:
    return lambda text: values.index(text)


_RANGES = {"Not Supported": 0, "Range A": 1, "Range B": 2, "Range AB": 3, "Range BC": 6}
_RANGES |= {"Range ABC": 7, "Range BCD": 14, "Range ABCD": 15}
_TIMEOUTS = {"50us to 50ms": 0, "50us to 100us": 1, "1ms to 10ms": 2, "16ms to 55ms": 5}
_TIMEOUTS |= {"65ms to 210ms": 6, "260ms to 900ms": 9, "1s to 3.5s": 10, "4s to 13s": 13}
_TIMEOUTS |= {"17s to 64s": 14}
# Where lspci has no word for a reserved code, the code itself need only be one of the others.
ANY = object()

_UNCORRECTABLE = {
    "DLP": "data_link",
    "SDES": "surprise_down",
    "TLP": "poisoned_tlp",
    "FCP": "flow_control",
    "CmpltTO": "completion_timeout",
    "CmpltAbrt": "completer_abort",
    "UnxCmplt": "unexpected_completion",
    "RxOF": "receiver_overflow",
    "MalfTLP": "malformed_tlp",
    "ECRC": "ecrc",
    "UnsupReq": "unsupported_request",
    "ACSViol": "acs_violation",
}
_CORRECTABLE = {
    "RxErr": "receiver",
    "BadTLP": "bad_tlp",
    "BadDLLP": "bad_dllp",
    "Rollover": "replay_rollover",
    "Timeout": "replay_timeout",
    "AdvNonFatalErr": "advisory_non_fatal",
}
_ACS = {
    "SrcValid": "source_validation",
    "TransBlk": "translation_blocking",
    "ReqRedir": "request_redirect",
    "CmpltRedir": "completion_redirect",
    "UpstreamFwd": "upstream_forwarding",
    "EgressCtrl": "egress_control",
    "DirectTrans": "direct_translated",
}
_L1 = {
    "PCI-PM_L1.2": "pci_pm_l1_2",
    "PCI-PM_L1.1": "pci_pm_l1_1",
    "ASPM_L1.2": "aspm_l1_2",
    "ASPM_L1.1": "aspm_l1_1",
}


def _under(register: str, names: dict[str, str]) -> dict[str, str]:
    return {word: f"{register}.{name}" for word, name in names.items()}


# capability -> line -> lspci's flag -> our field. "" is the capability's first line.
FLAGS: dict[str, dict[str, dict[str, str]]] = {
    "pm": {
        "Flags": {
            "PMEClk": "pme_clock",
            "DSI": "device_specific_init",
            "D1": "d1",
            "D2": "d2",
        },
        "Status": {
            "NoSoftRst": "no_soft_reset",
            "PME-Enable": "pme_enable",
            "PME": "pme_status",
        },
        "Bridge": {"PM": "bridge_clock_control", "B3": "!bridge_b2"},
    },
    "msi": {"": {"Enable": "enabled", "Maskable": "maskable", "64bit": "64bit"}},
    "msi-x": {"": {"Enable": "enabled", "Masked": "masked"}},
    "af": {"AFCap": {"TP": "transactions_pending", "FLR": "flr"}, "AFStatus": {"TP": "pending"}},
    "pcie": {
        "": {"Slot": "slot_implemented"},
        "DevCap": {
            "ExtTag": "device_capabilities.extended_tag",
            "AttnBtn": "device_capabilities.attention_button",
            "AttnInd": "device_capabilities.attention_indicator",
            "PwrInd": "device_capabilities.power_indicator",
            "RBE": "device_capabilities.role_based_error_reporting",
            "FLReset": "device_capabilities.flr",
        },
        "DevCtl": {
            "CorrErr": "device_control.correctable_errors",
            "NonFatalErr": "device_control.non_fatal_errors",
            "FatalErr": "device_control.fatal_errors",
            "UnsupReq": "device_control.unsupported_requests",
            "RlxdOrd": "device_control.relaxed_ordering",
            "ExtTag": "device_control.extended_tag",
            "PhantFunc": "device_control.phantom_functions",
            "AuxPwr": "device_control.aux_power",
            "NoSnoop": "device_control.no_snoop",
            "BrConfRtry": "device_control.bridge_retry_or_flr",
            "FLReset": "device_control.bridge_retry_or_flr",
        },
        "DevSta": {
            "CorrErr": "device_status.correctable_error",
            "NonFatalErr": "device_status.non_fatal_error",
            "FatalErr": "device_status.fatal_error",
            "UnsupReq": "device_status.unsupported_request",
            "AuxPwr": "device_status.aux_power",
            "TransPend": "device_status.transactions_pending",
        },
        "LnkCap": {
            "ClockPM": "link_capabilities.clock_power_management",
            "Surprise": "link_capabilities.surprise_down_reporting",
            "LLActRep": "link_capabilities.active_reporting",
            "BwNot": "link_capabilities.bandwidth_notification",
            "ASPMOptComp": "link_capabilities.aspm_optionality",
        },
        "LnkCtl": {
            "Disabled": "link_control.disabled",
            "CommClk": "link_control.common_clock",
            "ExtSynch": "link_control.extended_synch",
            "ClockPM": "link_control.clock_power_management",
            "AutWidDis": "link_control.autonomous_width_disable",
            "BWInt": "link_control.bandwidth_interrupt",
            "AutBWInt": "link_control.autonomous_bandwidth_interrupt",
        },
        "LnkSta": {
            "TrErr": "link_status.training_error",
            "Train": "link_status.training",
            "SlotClk": "link_status.slot_clock",
            "DLActive": "link_status.active",
            "BWMgmt": "link_status.bandwidth_management",
            "ABWMgmt": "link_status.autonomous_bandwidth",
        },
        "SltCap": {
            "AttnBtn": "slot_capabilities.attention_button",
            "PwrCtrl": "slot_capabilities.power_controller",
            "MRL": "slot_capabilities.mrl_sensor",
            "AttnInd": "slot_capabilities.attention_indicator",
            "PwrInd": "slot_capabilities.power_indicator",
            "HotPlug": "slot_capabilities.hot_plug",
            "Surprise": "slot_capabilities.hot_plug_surprise",
            "Interlock": "slot_capabilities.interlock",
            "NoCompl": "slot_capabilities.no_command_completed",
        },
        "SltCtl": {
            "AttnBtn": "slot_control.attention_button",
            "PwrFlt": "slot_control.power_fault",
            "MRL": "slot_control.mrl_sensor",
            "PresDet": "slot_control.presence_detect",
            "CmdCplt": "slot_control.command_completed",
            "HPIrq": "slot_control.hot_plug_interrupt",
            "LinkChg": "slot_control.link_state",
            "Power": "slot_control.power_off",
            "Interlock": "slot_control.interlock",
        },
        "SltSta": {
            "AttnBtn": "slot_status.attention_button",
            "PowerFlt": "slot_status.power_fault",
            "MRL": "slot_status.mrl_open",
            "CmdCplt": "slot_status.command_completed",
            "PresDet": "slot_status.present",
            "Interlock": "slot_status.interlock",
            "ChangedMRL": "slot_status.mrl_changed",
            "ChangedPresDet": "slot_status.presence_changed",
            "LinkState": "slot_status.link_changed",
        },
        "RootCap": {"CRSVisible": "root_capabilities.crs_visible"},
        "RootCtl": {
            "ErrCorrectable": "root_control.correctable_errors",
            "ErrNon-Fatal": "root_control.non_fatal_errors",
            "ErrFatal": "root_control.fatal_errors",
            "PMEIntEna": "root_control.pme_interrupt",
            "CRSVisible": "root_control.crs_visible",
        },
        "RootSta": {"PMEStatus": "root_status.pme", "PMEPending": "root_status.pme_pending"},
        "DevCap2": _under(
            "device_capabilities_2",
            {
                "TimeoutDis": "completion_timeout_disable",
                "NROPrPrP": "no_relaxed_ordering_p2p",
                "LTR": "ltr",
                "10BitTagComp": "ten_bit_tag_completer",
                "10BitTagReq": "ten_bit_tag_requester",
                "ExtFmt": "extended_format",
                "EETLPPrefix": "end_end_tlp_prefix",
                "EmergencyPowerReductionInit": "emergency_power_reduction_init",
                "FRS": "frs",
                "ARIFwd": "ari_forwarding",
                "Routing": "atomic_routing",
                "32bit": "atomic_32",
                "64bit": "atomic_64",
                "128bitCAS": "atomic_cas_128",
            },
        ),
        "DevCtl2": _under(
            "device_control_2",
            {
                "TimeoutDis": "completion_timeout_disable",
                "LTR": "ltr",
                "10BitTagReq": "ten_bit_tag_requester",
                "ARIFwd": "ari_forwarding",
                "ReqEn": "atomic_requester",
                "EgressBlck": "atomic_egress_block",
            },
        ),
        "LnkCap2": _under(
            "link_capabilities_2",
            {
                "Crosslink": "crosslink",
                "Retimer": "retimer",
                "2Retimers": "two_retimers",
                "DRS": "drs",
            },
        ),
        "LnkCtl2": _under(
            "link_control_2",
            {
                "EnterCompliance": "enter_compliance",
                "SpeedDis": "autonomous_speed_disable",
                "EnterModifiedCompliance": "enter_modified_compliance",
                "ComplianceSOS": "compliance_sos",
            },
        ),
        "LnkSta2": _under(
            "link_status_2",
            {
                "EqualizationComplete": "equalization_complete",
                "EqualizationPhase1": "equalization_phase1",
                "EqualizationPhase2": "equalization_phase2",
                "EqualizationPhase3": "equalization_phase3",
                "LinkEqualizationRequest": "equalization_request",
                "Retimer": "retimer",
                "2Retimers": "two_retimers",
                "DRS": "drs",
            },
        ),
    },
    "aer": {
        "UESta": _under("uncorrectable_status", _UNCORRECTABLE),
        "UEMsk": _under("uncorrectable_mask", _UNCORRECTABLE),
        "UESvrt": _under("uncorrectable_severity", _UNCORRECTABLE),
        "CESta": _under("correctable_status", _CORRECTABLE),
        "CEMsk": _under("correctable_mask", _CORRECTABLE),
        "AERCap": _under(
            "control",
            {
                "ECRCGenCap": "ecrc_generation_capable",
                "ECRCGenEn": "ecrc_generation",
                "ECRCChkCap": "ecrc_check_capable",
                "ECRCChkEn": "ecrc_check",
                "MultHdrRecCap": "multiple_headers_capable",
                "MultHdrRecEn": "multiple_headers",
                "TLPPfxPres": "tlp_prefix_present",
                "HdrLogCap": "completion_timeout_log",
            },
        ),
        "RootCmd": _under(
            "root_command", {"CERptEn": "correctable", "NFERptEn": "non_fatal", "FERptEn": "fatal"}
        ),
        "RootSta": _under(
            "root_status",
            {
                "CERcvd": "correctable",
                "MultCERcvd": "multiple_correctable",
                "UERcvd": "uncorrectable",
                "MultUERcvd": "multiple_uncorrectable",
                "FirstFatal": "first_fatal",
                "NonFatalMsg": "non_fatal",
                "FatalMsg": "fatal",
            },
        ),
    },
    "acs": {"ACSCap": _under("capabilities", _ACS), "ACSCtl": _under("control", _ACS)},
    "ari": {
        "ARICap": {"MFVC": "capabilities.mfvc_groups", "ACS": "capabilities.acs_groups"},
        "ARICtl": {"MFVC": "control.mfvc_groups", "ACS": "control.acs_groups"},
    },
    "ats": {"ATSCtl": {"Enable": "control.enabled"}},
    "pri": {
        "PRICtl": {"Enable": "control.enabled", "Reset": "control.reset"},
        "PRISta": {
            "RF": "status.response_failure",
            "UPRGI": "status.unexpected_group",
            "Stopped": "status.stopped",
        },
    },
    "pasid": {
        "PASIDCap": {"Exec": "capabilities.execute", "Priv": "capabilities.privileged"},
        "PASIDCtl": {
            "Enable": "control.enabled",
            "Exec": "control.execute",
            "Priv": "control.privileged",
        },
    },
    "sriov": {
        "IOVCap": {
            "Migration": "capabilities.migration",
            "10BitTagReq": "capabilities.ten_bit_tag",
        },
        "IOVCtl": {
            "Enable": "control.vfs",
            "Migration": "control.migration",
            "Interrupt": "control.migration_interrupt",
            "MSE": "control.memory",
            "ARIHierarchy": "control.ari",
            "10BitTagReq": "control.ten_bit_tag",
        },
        "IOVSta": {"Migration": "status.migration"},
    },
    "dpc": {
        "DpcCap": {
            "RPExt": "capabilities.root_port_extensions",
            "PoisonedTLP": "capabilities.poisoned_tlp_blocking",
            "SwTrigger": "capabilities.software_trigger",
            "DL_ActiveErr": "capabilities.dl_active_error",
        },
        "DpcCtl": {
            "Cmpl": "control.completion_ur",
            "INT": "control.interrupt",
            "ErrCor": "control.correctable_error",
            "PoisonedTLP": "control.poisoned_tlp_blocking",
            "SwTrigger": "control.software_trigger",
            "DL_ActiveErr": "control.dl_active_error",
        },
        "DpcSta": {
            "Trigger": "status.triggered",
            "INT": "status.interrupt",
            "RPBusy": "status.busy",
        },
    },
    "secondary-pcie": {
        "LnkCtl3": {
            "LnkEquIntrruptEn": "link_control_3.equalization_interrupt",
            "PerformEqu": "link_control_3.perform_equalization",
        }
    },
    "l1-pm": {
        "L1SubCap": _under("capabilities", {**_L1, "L1_PM_Substates": "supported"}),
        "L1SubCtl1": _under("control", _L1),
    },
    "ptm": {
        "PTMCap": {
            "Requester:": "capabilities.requester",
            "Responder:": "capabilities.responder",
            "Root:": "capabilities.root",
        },
        "PTMControl": {"Enabled:": "control.enabled", "RootSelected:": "control.root"},
    },
    "doe": {
        "DOECap": {"IntSup": "capabilities.interrupt"},
        "DOECtl": {"IntEn": "control.interrupt"},
        "DOESta": {
            "Busy": "status.busy",
            "IntSta": "status.interrupt",
            # lspci 3.9 tests bits 0 and 1 here; the error is bit 2 (PCI Express 6.0, 7.9.24.4).
            "Error": "",
            "ObjectReady": "status.ready",
        },
    },
}

# capability -> line -> (pattern with one group, our field, reading of the group).
VALUES: dict[str, dict[str, list[Rule]]] = {
    "pm": {
        "": [(r"^Power Management version (\d)", "version", int)],
        "Flags": [
            (r"AuxCurrent=(\d+)mA", "aux_current_ma", int),
            (
                r"PME\((.*)\)",
                "pme_from",
                lambda text: [item[:-1] for item in text.split(",") if item.endswith("+")],
            ),
        ],
        "Status": [
            (r"\b(D[0-3])\b", "power_state", lambda text: text.replace("D3", "D3hot")),
            (r"DSel=(\d+)", "data_select", int),
            (r"DScale=(\d+)", "data_scale", int),
        ],
    },
    "msi": {
        "": [
            (r"^MSI:()", "", str),
            (r"Count=(\d+)/", "vectors_enabled", int),
            (r"(\d+)(?= (?:Maskable|64bit))", "vectors", int),
        ],
        "Address": [
            (r"^([0-9a-f]+)", "address", _hex),
            (r"Data: ([0-9a-f]+)", "data", _hex),
        ],
        "Masking": [
            (r"^([0-9a-f]+)", "mask", _hex),
            (r"Pending: ([0-9a-f]+)", "pending", _hex),
        ],
    },
    "msi-x": {
        "": [(r"^MSI-X:()", "", str), (r"Count=(\d+)", "vectors", int)],
        "Vector table": [
            (r"BAR=(\d)", "table_bar", int),
            (r"offset=([0-9a-f]+)", "table_offset", _hex),
        ],
        "PBA": [(r"BAR=(\d)", "pba_bar", int), (r"offset=([0-9a-f]+)", "pba_offset", _hex)],
    },
    "af": {
        "": [(r"^PCI Advanced Features()", "", str)],
        "AFCtrl": [(r"FLR[+-]()", "", str)],
    },
    "vendor": {"": [(r"^Vendor Specific Information: Len=([0-9a-f]+)", "length", _hex)]},
    "subsystem": {
        "": [
            (r"\[([0-9a-f]{4}):", "subsystem_vendor", str),
            (r":([0-9a-f]{4})\]", "subsystem_device", str),
        ]
    },
    "debug-port": {
        "": [
            (r"^Debug port: BAR=(\d)", "bar", int),
            (r"offset=([0-9a-f]+)", "offset", _hex),
        ]
    },
    "sata": {
        "": [
            (r"^SATA HBA v(\d+\.\d+)", "version", str),
            (r"BAR(\d) Offset=[0-9a-f]+", "bar", int),
        ]
    },
    "pcie": {
        "": [
            (r"^Express \(v(\d+)\)", "version", int),
            (
                r"(Legacy Endpoint|Endpoint|Root Port|Upstream Port|Downstream Port|PCI-Express to "
                r"PCI/PCI-X Bridge|PCI/PCI-X to PCI-Express Bridge|Root Complex Integrated "
                r"Endpoint|Root Complex Event Collector|Unknown type \d+)(?=[ ,])",
                "port_type",
                lambda text: {
                    "Endpoint": "endpoint",
                    "Legacy Endpoint": "legacy-endpoint",
                    "Root Port": "root-port",
                    "Upstream Port": "upstream-port",
                    "Downstream Port": "downstream-port",
                    "PCI-Express to PCI/PCI-X Bridge": "pcie-to-pci-bridge",
                    "PCI/PCI-X to PCI-Express Bridge": "pci-to-pcie-bridge",
                    "Root Complex Integrated Endpoint": "integrated-endpoint",
                    "Root Complex Event Collector": "event-collector",
                }.get(text, f"unknown-{text.rpartition(' ')[2]}"),
            ),
            (r"MSI ([0-9a-f]{2})", "interrupt_message", _hex),
        ],
        "DevCap": [
            (r"MaxPayload (\d+) bytes", "device_capabilities.max_payload_bytes", int),
            (
                r"PhantFunc (\d)",
                "device_capabilities.phantom_functions",
                lambda text: int(text).bit_length(),
            ),
            (r"Latency L0s (\S+?),", "device_capabilities.l0s_latency_ns", _ns),
            (r"L1 (\S+)", "device_capabilities.l1_latency_ns", _ns),
            (r"SlotPowerLimit (\S+)", "device_capabilities.slot_power_limit_w", _power),
        ],
        "DevCtl": [
            (r"MaxPayload (\d+) bytes", "device_control.max_payload_bytes", int),
            (r"MaxReadReq (\d+) bytes", "device_control.max_read_request_bytes", int),
        ],
        "LnkCap": [
            (r"Port #(\d+)", "link_capabilities.port", int),
            (r"Speed ([^,]+)", "link_capabilities.max_speed_gts", _speed),
            (r"Width x(\d+)", "link_capabilities.max_width", int),
            (r"ASPM ((?:L0s|L1| )+|not supported)", "link_capabilities.aspm", _aspm),
            (r"L0s (<\S+?|unlimited)(?=[, ])", "link_capabilities.l0s_exit_latency_ns", _ns),
            (r"L1 (<\S+|unlimited)", "link_capabilities.l1_exit_latency_ns", _ns),
            (r"(?<=, )Exit Latency()", "", str),
        ],
        "LnkCtl": [
            (r"ASPM ([^;]+);", "link_control.aspm", _aspm),
            (
                r"RCB (\d+) bytes",
                "link_control.read_completion_boundary_128",
                lambda text: text == "128",
            ),
        ],
        "LnkSta": [
            (r"Speed (\S+?)(?: \(\w+\))?,", "link_status.speed_gts", _speed),
            (r"Width x(\d+)(?: \(\w+\))?", "link_status.width", int),
        ],
        "SltCap": [
            (r"Slot #(\d+)", "slot_capabilities.slot", int),
            (r"PowerLimit ([^;]+)", "slot_capabilities.slot_power_limit_w", _power),
        ],
        "SltCtl": [
            (
                r"AttnInd (\w+)",
                "slot_control.attention_indicator",
                lambda text: {"Unknown": None}.get(text, text.lower()),
            ),
            (
                r"PwrInd (\w+)",
                "slot_control.power_indicator",
                lambda text: {"Unknown": None}.get(text, text.lower()),
            ),
            (r"Enable:()", "", str),
            (r"Control:()", "", str),
        ],
        "SltSta": [(r"(?:Status):()", "", str)],
        "RootSta": [(r"PME ReqID ([0-9a-f]{4})", "root_status.pme_requester", str)],
        "DevCap2": [
            (
                r"Completion Timeout: ([^,]+)",
                "device_capabilities_2.completion_timeout_ranges",
                lambda text: _RANGES.get(text, ANY),
            ),
            (
                r"OBFF ([^,]+)",
                "device_capabilities_2.obff",
                _table("Not Supported", "Via message", "Via WAKE#", "Via message/WAKE#"),
            ),
            (
                r"MaxEETLPPrefixes (\d)",
                "device_capabilities_2.max_end_end_tlp_prefixes",
                lambda text: int(text) % 4,
            ),
            (
                r"EmergencyPowerReduction ([^,]+)",
                "device_capabilities_2.emergency_power_reduction",
                _table("Not Supported", "Dev Specific", "Form Factor Dev Specific", "Reserved"),
            ),
            (
                r"LN System CLS ([^,]+)",
                "device_capabilities_2.ln_system_cls",
                _table("Not Supported", "64byte cachelines", "128byte cachelines", "Reserved"),
            ),
            (
                r"(TPHComp[+-] ExtTPHComp[+-])",
                "device_capabilities_2.tph_completer",
                _table(
                    "TPHComp- ExtTPHComp-", "TPHComp+ ExtTPHComp-", None, "TPHComp+ ExtTPHComp+"
                ),
            ),
            (r"AtomicOpsCap:()", "", str),
        ],
        "DevCtl2": [
            (
                r"Completion Timeout: ([^,]+)",
                "device_control_2.completion_timeout",
                lambda text: _TIMEOUTS.get(text, ANY),
            ),
            (
                r"OBFF ([^,]+)",
                "device_control_2.obff",
                _table("Disabled", "Via message A", "Via message B", "Via WAKE#"),
            ),
            (r"AtomicOpsCtl:()", "", str),
        ],
        "LnkCap2": [
            (
                r"Supported Link Speeds: ([^,]+)",
                "link_capabilities_2.speeds_gts",
                lambda text: _SPEEDS[text],
            ),
        ],
        "LnkCtl2": [
            (
                r"Target Link Speed: ([^,]+)",
                "link_control_2.target_speed_gts",
                # 0 means 2.5 GT/s to lspci; we leave a field that is not set empty.
                lambda text: ANY if text == "2.5GT/s" else _speed(text),
            ),
            (
                r"Selectable De-emphasis: (\S+)",
                "link_control_2.selectable_deemphasis",
                lambda text: text == "-3.5dB",
            ),
            (
                r"Transmit Margin: ([^,]+)",
                "link_control_2.transmit_margin",
                lambda text: {
                    "Normal Operating Range": 0,
                    "800-1200mV(full-swing)/400-700mV(half-swing)": 1,
                }.get(text, ANY),
            ),
            (
                r"Compliance Preset/De-emphasis: (.*)$",
                "link_control_2.compliance_preset",
                lambda text: ANY,
            ),
        ],
        "LnkSta2": [
            (
                r"Current De-emphasis Level: (\S+?),",
                "link_status_2.deemphasis_3_5db",
                lambda text: text == "-3.5dB",
            ),
            (
                r"CrosslinkRes: (unsupported|Upstream Port|Downstream Port|incomplete)",
                "link_status_2.crosslink_resolution",
                _table("unsupported", "Upstream Port", "Downstream Port", "incomplete"),
            ),
            (
                r"DownstreamComp: (.*)$",
                "link_status_2.downstream_component",
                lambda text: {
                    "Link Down - Not Determined": 0,
                    "Link Down - Not Present": 1,
                    "Link Down - Present": 2,
                    "Link Up - Present": 4,
                    "Link Up - Present and DRS Received": 5,
                }.get(text, ANY),
            ),
        ],
    },
    "aer": {
        "": [(r"^Advanced Error Reporting()", "", str)],
        "AERCap": [(r"First Error Pointer: ([0-9a-f]+)", "control.first_error", _hex)],
        "HeaderLog": [(r"^(.*)$", "header_log", str.split)],
        "RootSta": [(r"IntMsg (\d+)", "root_status.interrupt_message", int)],
        "ErrorSrc": [
            (r"ERR_COR: ([0-9a-f]{4})", "source.correctable", str),
            (r"ERR_FATAL/NONFATAL: ([0-9a-f]{4})", "source.uncorrectable", str),
        ],
    },
    "acs": {"": [(r"^Access Control Services()", "", str)]},
    "ari": {
        "": [(r"^Alternative Routing-ID Interpretation \(ARI\)()", "", str)],
        "ARICap": [(r"Next Function: (\d+)", "capabilities.next_function", int)],
        "ARICtl": [(r"Function Group: (\d+)", "control.function_group", int)],
    },
    "ats": {
        "": [(r"^Address Translation Service \(ATS\)()", "", str)],
        "ATSCap": [(r"Invalidate Queue Depth: ([0-9a-f]+)", "capabilities.queue_depth", _hex)],
        "ATSCtl": [(r"Smallest Translation Unit: ([0-9a-f]+)", "control.smallest_unit", _hex)],
    },
    "pri": {
        "": [(r"^Page Request Interface \(PRI\)()", "", str)],
        "Page Request Capacity": [
            (r"^([0-9a-f]+)", "capacity", _hex),
            (r"Page Request Allocation: ([0-9a-f]+)", "allocation", _hex),
        ],
    },
    "pasid": {
        "": [(r"^Process Address Space ID \(PASID\)()", "", str)],
        "PASIDCap": [(r"Max PASID Width: ([0-9a-f]+)", "capabilities.max_width", _hex)],
    },
    "sriov": {
        "": [(r"^Single Root I/O Virtualization \(SR-IOV\)()", "", str)],
        "IOVCap": [(r"Interrupt Message Number: ([0-9a-f]+)", "capabilities.message", _hex)],
        "Initial VFs": [
            (r"^(\d+)", "initial_vfs", int),
            (r"Total VFs: (\d+)", "total_vfs", int),
            (r"Number of VFs: (\d+)", "num_vfs", int),
            (r"Function Dependency Link: ([0-9a-f]+)", "function_dependency_link", _hex),
        ],
        "VF offset": [
            (r"^(\d+)", "vf_offset", int),
            (r"stride: (\d+)", "vf_stride", int),
            (r"Device ID: ([0-9a-f]{4})", "vf_device", str),
        ],
        "Supported Page Size": [
            (r"^([0-9a-f]+)", "supported_page_sizes", _hex),
            (r"System Page Size: ([0-9a-f]+)", "system_page_size", _hex),
        ],
        "VF Migration": [
            (
                r"offset: ([0-9a-f]+)",
                "migration_state_array.offset_8",
                lambda text: int(text, 16) >> 3,
            ),
            (r"BIR: ([0-9a-f])", "migration_state_array.bar", _hex),
        ],
    },
    "dsn": {"": [(r"^Device Serial Number ([0-9a-f-]+)", "serial", str)]},
    "vsec": {
        "": [
            (r"^Vendor Specific Information: ID=([0-9a-f]{4})", "id", str),
            (r"Rev=(\d+)", "revision", int),
            (r"Len=([0-9a-f]+)", "length", _hex),
            (r"<\?>()", "", str),
        ]
    },
    "dvsec": {
        "": [
            (r"^Designated Vendor-Specific: Vendor=([0-9a-f]{4})", "vendor", str),
            (r" ID=([0-9a-f]{4})", "id", str),
            (r"Rev=(\d+)", "revision", int),
            (r"Len=(\d+)", "length", int),
            (r"(?:<\?>|: CXL.*$)()", "", str),
        ]
    },
    "dpc": {
        "": [(r"^Downstream Port Containment()", "", str)],
        "DpcCap": [
            (r"INT Msg #(\d+)", "capabilities.interrupt_message", int),
            (r"RP PIO Log (\d+)", "capabilities.pio_log_size", int),
        ],
        "DpcCtl": [(r"Trigger:([0-9a-f])", "control.trigger", _hex)],
        "DpcSta": [
            (r"Reason:([0-9a-f]+)", "status.reason", _hex),
            (r"TriggerExt:([0-9a-f]+)", "status.reason_extension", _hex),
            (r"RP PIO ErrPtr:([0-9a-f]+)", "status.pio_first_error", _hex),
        ],
        "Source": [(r"^([0-9a-f]{4})", "source", str)],
    },
    "ltr": {
        "": [(r"^Latency Tolerance Reporting()", "", str)],
        "Max snoop latency": [(r"^(\d+)ns", "max_snoop_ns", int)],
        "Max no snoop latency": [(r"^(\d+)ns", "max_no_snoop_ns", int)],
    },
    "secondary-pcie": {
        "": [(r"^Secondary PCI Express()", "", str)],
        "LaneErrStat": [
            (
                r"^(.*)$",
                "lane_errors",
                lambda text: [int(word) for word in re.findall(r"\d+", text) if text != "0"],
            )
        ],
    },
    "l1-pm": {
        "": [(r"^L1 PM Substates()", "", str)],
        "L1SubCap": [
            (r"PortCommonModeRestoreTime=(\d+)us", "capabilities.common_mode_restore_us", int),
            (
                r"PortTPowerOnTime=(\d+us|<error>)",
                "capabilities.power_on_us",
                lambda text: None if text == "<error>" else int(text[:-2]),
            ),
        ],
        "L1SubCtl1": [
            (r"T_CommonMode=(\d+)us", "control.common_mode_restore_us", int),
            (
                r"LTR1.2_Threshold=(\d+ns|<error>)",
                "control.ltr_threshold_ns",
                lambda text: None if text == "<error>" else int(text[:-2]),
            ),
        ],
        "L1SubCtl2": [
            (
                r"T_PwrOn=(\d+us|<error>)",
                "power_on_us",
                lambda text: None if text == "<error>" else int(text[:-2]),
            )
        ],
    },
    "ptm": {
        "": [(r"^Precision Time Measurement()", "", str)],
        "PTMClockGranularity": [
            (
                r"^(.*)$",
                "capabilities.granularity_ns",
                lambda text: int(text[:-2]) if text[0].isdigit() else None,
            )
        ],
        "PTMEffectiveGranularity": [
            (
                r"^(.*)$",
                "control.granularity_ns",
                lambda text: int(text[:-2]) if text[0].isdigit() else None,
            )
        ],
    },
    "doe": {
        "": [(r"^Data Object Exchange()", "", str)],
        "DOECap": [
            (r"Interrupt Message Number ([0-9a-f]+)", "capabilities.interrupt_message", _hex)
        ],
    },
}
# lspci names these and prints nothing, or not enough, of what is in them.
NAME_ONLY = {
    "null": "Null",
    "hot-plug": "Hot-plug capable",
    "compact-pci-hot-swap": "CompactPCI hot-swap <?>",
    "compact-pci-crc": "CompactPCI central resource control <?>",
    "secure": "Secure device <?>",
    "power-budgeting": "Power Budgeting <?>",
    "rc-internal-link": "Root Complex Internal Link <?>",
    "mfvc": "Multi-Function Virtual Channel <?>",
    "rcrb": "Root Complex Register Block <?>",
    "mriov": "Multi-Root I/O Virtualization <?>",
    "dpa": "Dynamic Power Allocation <?>",
    "pmux": "Protocol Multiplexing <?>",
    "lnr": "LN Requester <?>",
    "m-pcie": "PCI Express over M_PHY <?>",
    "frs": "FRS Queueing <?>",
    "readiness": "Readiness Time Reporting <?>",
    "data-link-feature": "Data Link Feature <?>",
    "phy-16gt": "Physical Layer 16.0 GT/s <?>",
    "lane-margining": "Lane Margining at the Receiver <?>",
    "hierarchy-id": "Hierarchy ID <?>",
    "npem": "Native PCIe Enclosure Management <?>",
    "rc-link": "Root Complex Link",
    "rcec": "Root Complex Event Collector Endpoint Association",
    "vpd": "Vital Product Data",
}
# Compared by a function of their own, below.
OWN_RULES = {"rebar", "vf-rebar", "tph", "vc", "multicast", "ea", "hypertransport", "pci-x", "agp"}
