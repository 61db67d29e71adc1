"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("ok", "note", "warning", "blocker")


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` is a stable name; `severity` one of SEVERITIES, in rising order.

    `evidence` says where it can be checked, `remedy` holds commands to type in this order, and
    `page` explains it.
    """

    check: str
    severity: str
    summary: str
    evidence: str
    remedy: tuple[str, ...] = ()
    page: str | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "check": self.check,
            "severity": self.severity,
            "summary": self.summary,
            "evidence": self.evidence,
            "remedy": list(self.remedy),
            "page": self.page,
        }


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
