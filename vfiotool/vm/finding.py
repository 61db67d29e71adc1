"""What `vm check` says about one thing, and what the virtual machine is to be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.errors import UsageError

BLOCKER, WARNING, NOTE = "blocker", "warning", "note"
HYPERVISORS = ("qemu", "libvirt", "cloud-hypervisor")
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:iB|B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, slots=True)
class WantedGuest:
    """The virtual machine that the devices are for; None where it was not said."""

    memory_bytes: int | None = None
    vcpus: int | None = None
    hypervisor: str = "qemu"
    iommufd: bool = False
    viommu: bool = False


@dataclass(frozen=True, slots=True)
class PreflightFinding:
    """One thing that stands between a device and a VM, or that one should know of it.

    `severity`: a blocker keeps the VM from starting, a warning from starting twice or from being
    fast, a note from nothing. `number` is the amount that `detail` is about (what is missing, what
    is there), in `unit`. `remedy` holds lines to type or to paste, the first of them is `next`.
    """

    device: str
    kind: str
    detail: str
    next: str
    severity: str = BLOCKER
    evidence: str = ""
    number: int | None = None
    unit: str | None = None
    remedy: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "kind": self.kind,
            "severity": self.severity,
            "detail": self.detail,
            "evidence": self.evidence,
            "number": self.number,
            "unit": self.unit,
            "remedy": list(self.remedy or ((self.next,) if self.next else ())),
            "next": self.next or None,
        }


def finding(
    device: str,
    kind: str,
    severity: str,
    detail: str,
    evidence: str,
    *remedy: str,
    number: int | None = None,
    unit: str | None = None,
) -> PreflightFinding:
    """A finding with its remedies in the order in which they are typed."""
    first = remedy[0] if remedy else ""
    return PreflightFinding(device, kind, detail, first, severity, evidence, number, unit, remedy)


def parse_memory(text: str) -> int:
    """`16G` in bytes; a bare number counts MiB, as QEMU's -m does. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << _UNITS[match[2].upper() or "M"] if match else 0
    if not 1 << 20 <= size <= 1 << 52:
        raise UsageError(f"{text[:40]!r} is not an amount of memory", hint="write 16G or 2048M")
    return size


def words_of(size: int) -> str:
    """Bytes for people: `16 GiB`, `1.5 GiB`, `64 KiB`."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            value = size / (1 << shift)
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{size} B"
