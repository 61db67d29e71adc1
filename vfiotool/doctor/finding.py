"""What the doctor says about one thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("ok", "note", "warning", "blocker")


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` is a stable name; `severity` one of SEVERITIES, in rising order.

    `evidence` says where it can be checked, `remedy` holds commands to type in this order, and
    `page` explains it. Findings of one `topic`, which is a sentence with `{}` in it, say the same
    of several `subject`s, and are one finding to a person (`merged`).
    """

    check: str
    severity: str
    summary: str
    evidence: str
    remedy: tuple[str, ...] = ()
    page: str | None = None
    topic: str | None = None
    subject: str = ""

    def as_json(self) -> dict[str, object]:
        return {
            "check": self.check,
            "severity": self.severity,
            "summary": self.summary,
            "evidence": self.evidence,
            "remedy": list(self.remedy),
            "page": self.page,
        }


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings with those of one topic as one, at the place of the first."""
    groups: dict[object, list[Finding]] = {}
    for finding in findings:
        key = finding if finding.topic is None else (finding.severity, finding.topic)
        groups.setdefault(key, []).append(finding)
    return tuple(_merge(group) for group in groups.values())


def _merge(group: list[Finding]) -> Finding:
    first = group[0]
    if len(group) == 1 or first.topic is None:
        return first
    remedy = dict.fromkeys(command for finding in group for command in finding.remedy)
    evidence = dict.fromkeys(part for finding in group for part in finding.evidence.split("; "))
    return Finding(
        first.check,
        first.severity,
        first.topic.format(", ".join(finding.subject for finding in group)),
        "; ".join(evidence),
        tuple(remedy),
        first.page,
    )


KERNEL_DOCS = "https://docs.kernel.org"
VFIO_PAGE = f"{KERNEL_DOCS}/driver-api/vfio.html"
IOMMUFD_PAGE = f"{KERNEL_DOCS}/userspace-api/iommufd.html"
IOMMU_PAGE = f"{KERNEL_DOCS}/arch/x86/iommu.html"
PARAMETERS_PAGE = f"{KERNEL_DOCS}/admin-guide/kernel-parameters.html"
HUGEPAGES_PAGE = f"{KERNEL_DOCS}/admin-guide/mm/hugetlbpage.html"
SRIOV_PAGE = f"{KERNEL_DOCS}/PCI/pci-iov-howto.html"
LOCKDOWN_PAGE = "https://man7.org/linux/man-pages/man7/kernel_lockdown.7.html"
KVM_PAGE = f"{KERNEL_DOCS}/virt/kvm/index.html"
LIMITS_PAGE = "https://man7.org/linux/man-pages/man2/setrlimit.2.html"
