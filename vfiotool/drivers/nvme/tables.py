"""Structures that a controller returns, under the names that nvme-cli gives their fields.

A table is (name, offset, bytes) a field; what is not a number is marked: "s" text, "x" hexadecimal.
Sources: NVM Express Base Specification 2.0, figures 206 to 208 (error, health and firmware logs),
275 (Identify Controller); NVM Command Set Specification 1.0, figure 97 (Identify Namespace).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

from vfiotool.drivers.nvme.identify import text

Table = Sequence[tuple[str, int, int] | tuple[str, int, int, str]]

ID_CTRL: Table = (
    ("vid", 0, 2), ("ssvid", 2, 2), ("sn", 4, 20, "s"), ("mn", 24, 40, "s"), ("fr", 64, 8, "s"),
    ("rab", 72, 1), ("ieee", 73, 3), ("cmic", 76, 1), ("mdts", 77, 1), ("cntlid", 78, 2),
    ("ver", 80, 4), ("rtd3r", 84, 4), ("rtd3e", 88, 4), ("oaes", 92, 4), ("ctratt", 96, 4),
    ("rrls", 100, 2), ("cntrltype", 111, 1), ("fguid", 112, 16, "x"), ("crdt1", 128, 2),
    ("crdt2", 130, 2), ("crdt3", 132, 2), ("nvmsr", 253, 1), ("vwci", 254, 1), ("mec", 255, 1),
    ("oacs", 256, 2), ("acl", 258, 1), ("aerl", 259, 1), ("frmw", 260, 1), ("lpa", 261, 1),
    ("elpe", 262, 1), ("npss", 263, 1), ("avscc", 264, 1), ("apsta", 265, 1), ("wctemp", 266, 2),
    ("cctemp", 268, 2), ("mtfa", 270, 2), ("hmpre", 272, 4), ("hmmin", 276, 4),
    ("tnvmcap", 280, 16), ("unvmcap", 296, 16), ("rpmbs", 312, 4), ("edstt", 316, 2),
    ("dsto", 318, 1), ("fwug", 319, 1), ("kas", 320, 2), ("hctma", 322, 2), ("mntmt", 324, 2),
    ("mxtmt", 326, 2), ("sanicap", 328, 4), ("hmminds", 332, 4), ("hmmaxd", 336, 2),
    ("nsetidmax", 338, 2), ("endgidmax", 340, 2), ("anatt", 342, 1), ("anacap", 343, 1),
    ("anagrpmax", 344, 4), ("nanagrpid", 348, 4), ("pels", 352, 4), ("domainid", 356, 2),
    ("megcap", 368, 16), ("sqes", 512, 1), ("cqes", 513, 1), ("maxcmd", 514, 2), ("nn", 516, 4),
    ("oncs", 520, 2), ("fuses", 522, 2), ("fna", 524, 1), ("vwc", 525, 1), ("awun", 526, 2),
    ("awupf", 528, 2), ("icsvscc", 530, 1), ("nwpc", 531, 1), ("acwu", 532, 2), ("ocfs", 534, 2),
    ("sgls", 536, 4), ("mnan", 540, 4), ("maxdna", 544, 16), ("maxcna", 560, 4),
    ("subnqn", 768, 256, "s"), ("ioccsz", 1792, 4), ("iorcsz", 1796, 4), ("icdoff", 1800, 2),
    ("fcatt", 1802, 1), ("msdbd", 1803, 1), ("ofcs", 1804, 2),
)  # fmt: skip

ID_NS: Table = (
    ("nsze", 0, 8), ("ncap", 8, 8), ("nuse", 16, 8), ("nsfeat", 24, 1), ("nlbaf", 25, 1),
    ("flbas", 26, 1), ("mc", 27, 1), ("dpc", 28, 1), ("dps", 29, 1), ("nmic", 30, 1),
    ("rescap", 31, 1), ("fpi", 32, 1), ("dlfeat", 33, 1), ("nawun", 34, 2), ("nawupf", 36, 2),
    ("nacwu", 38, 2), ("nabsn", 40, 2), ("nabo", 42, 2), ("nabspf", 44, 2), ("noiob", 46, 2),
    ("nvmcap", 48, 16), ("npwg", 64, 2), ("npwa", 66, 2), ("npdg", 68, 2), ("npda", 70, 2),
    ("nows", 72, 2), ("mssrl", 74, 2), ("mcl", 76, 4), ("msrc", 80, 1), ("nulbaf", 81, 1),
    ("anagrpid", 92, 4), ("nsattr", 99, 1), ("nvmsetid", 100, 2), ("endgid", 102, 2),
    ("nguid", 104, 16, "x"), ("eui64", 120, 8, "x"),
)  # fmt: skip

SMART: Table = (
    ("critical_warning", 0, 1), ("temperature", 1, 2), ("avail_spare", 3, 1),
    ("spare_thresh", 4, 1), ("percent_used", 5, 1),
    ("endurance_grp_critical_warning_summary", 6, 1), ("data_units_read", 32, 16),
    ("data_units_written", 48, 16), ("host_read_commands", 64, 16),
    ("host_write_commands", 80, 16), ("controller_busy_time", 96, 16), ("power_cycles", 112, 16),
    ("power_on_hours", 128, 16), ("unsafe_shutdowns", 144, 16), ("media_errors", 160, 16),
    ("num_err_log_entries", 176, 16), ("warning_temp_time", 192, 4),
    ("critical_comp_time", 196, 4),
    *((f"temperature_sensor_{n + 1}", 200 + 2 * n, 2) for n in range(8)),
    ("thm_temp1_trans_count", 216, 4), ("thm_temp2_trans_count", 220, 4),
    ("thm_temp1_total_time", 224, 4), ("thm_temp2_total_time", 228, 4),
)  # fmt: skip

ERROR_ENTRY: Table = (
    ("error_count", 0, 8), ("sqid", 8, 2), ("cmdid", 10, 2), ("status_field", 12, 2),
    ("parm_error_location", 14, 2), ("lba", 16, 8), ("nsid", 24, 4), ("vs", 28, 1),
    ("trtype", 29, 1), ("cs", 32, 8), ("trtype_spec_info", 40, 2),
)  # fmt: skip

SANITIZE: Table = (
    ("sprog", 0, 2), ("sstat", 2, 2), ("cdw10_info", 4, 4), ("time_over_write", 8, 4),
    ("time_block_erase", 12, 4), ("time_crypto_erase", 16, 4),
    ("time_over_write_no_dealloc", 20, 4), ("time_block_erase_no_dealloc", 24, 4),
    ("time_crypto_erase_no_dealloc", 28, 4),
)  # fmt: skip


def decode(table: Table, raw: bytes) -> dict[str, Any]:
    """The fields of `raw`, numbers as such (little-endian), by name."""
    found: dict[str, Any] = {}
    for name, offset, size, *kind in table:
        part = raw[offset : offset + size]
        if not kind:
            found[name] = int.from_bytes(part, "little")
        else:
            found[name] = text(part.split(b"\0")[0]) if kind[0] == "s" else part.hex()
    return found


def id_ctrl(raw: bytes) -> dict[str, Any]:
    """Identify Controller in full, with the power states that there are."""
    found = decode(ID_CTRL, raw)
    found["psds"] = [_power_state(raw[2048 + 32 * n :]) for n in range(min(found["npss"], 31) + 1)]
    return found


def _power_state(raw: bytes) -> dict[str, int]:
    max_power, flags, enlat, exlat = struct.unpack_from("<HxBII", raw, 0)
    return {
        "max_power": max_power,
        "max_power_scale": flags & 1,
        "non-operational_state": flags >> 1 & 1,
        "entry_lat": enlat,
        "exit_lat": exlat,
    }


def id_ns(raw: bytes) -> dict[str, Any]:
    """Identify Namespace in full, with its formats: `lbafs` are metadata bytes, the power of two
    of a block's bytes, and the relative performance."""
    found = decode(ID_NS, raw)
    # Those of unique capabilities follow the others (NULBAF); 64 in all.
    count = min(found["nlbaf"] + found["nulbaf"], 63) + 1
    formats = (struct.unpack_from("<HBB", raw, 128 + 4 * n) for n in range(count))
    found["lbafs"] = [{"ms": ms, "ds": ds, "rp": rp & 3} for ms, ds, rp in formats]
    flbas = found["flbas"]
    found["in_use"] = flbas & 0xF | (flbas >> 5 & 3) << 4
    return found


def ns_descriptors(raw: bytes) -> dict[str, Any]:
    """The Namespace Identification Descriptors (figure 277): `eui64`, `nguid`, `uuid`, `csi`."""
    names = {1: "eui64", 2: "nguid", 3: "uuid", 4: "csi"}
    found: dict[str, Any] = {}
    at = 0
    while at + 4 <= len(raw) and raw[at]:
        kind, size = raw[at], raw[at + 1]
        value = raw[at + 4 : at + 4 + size]
        if kind in names and value:
            found[names[kind]] = value[0] if kind == 4 else value.hex()
        at += 4 + size
    if "uuid" in found and len(found["uuid"]) == 32:
        digits = found["uuid"]
        parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
        found["uuid"] = "-".join(parts)
    return found


def smart_log(raw: bytes) -> dict[str, Any]:
    """SMART / Health Information; temperatures in kelvin."""
    return decode(SMART, raw)


def error_log(raw: bytes) -> list[dict[str, Any]]:
    """The entries of the error log that are in use, newest first."""
    entries = (decode(ERROR_ENTRY, raw[at : at + 64]) for at in range(0, len(raw) - 63, 64))
    found = [entry for entry in entries if entry["error_count"]]
    for entry in found:
        entry["status_field"] >>= 1  # bit 0 is the phase tag
    return found


def fw_log(raw: bytes) -> dict[str, Any]:
    """The firmware slots: `afi`, and the revision in each slot that has one."""
    slots = {f"frs{n}": text(raw[8 * n : 8 * n + 8]) for n in range(1, 8)}
    return {"afi": raw[0], **{name: revision for name, revision in slots.items() if revision}}


def changed_namespaces(raw: bytes) -> list[int]:
    """The namespaces that changed since the log was read; 0xffffffff alone: more than 1,024."""
    return [nsid for (nsid,) in struct.iter_unpack("<I", raw[:4096]) if nsid]


def effects_log(raw: bytes) -> dict[str, dict[str, int]]:
    """Commands Supported and Effects, of those that are supported, by opcode in hexadecimal."""

    def listed(start: int) -> Iterator[tuple[str, int]]:
        for opcode in range(256):
            (effects,) = struct.unpack_from("<I", raw, start + 4 * opcode)
            if effects & 1:
                yield f"{opcode:#04x}", effects

    return {"admin": dict(listed(0)), "io": dict(listed(1024))}
