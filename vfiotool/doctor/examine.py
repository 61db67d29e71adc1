"""Is this host ready to hand devices over: findings with evidence, remedy and page."""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.devices.inventory import Inventory
from vfiotool.doctor.conflicts import examine_conflicts
from vfiotool.doctor.finding import SEVERITIES, Finding
from vfiotool.doctor.iommu import examine_iommu
from vfiotool.doctor.kernel import examine_kernel
from vfiotool.host.distribution import read_distribution
from vfiotool.host.host import Host

__all__ = ["Diagnosis", "Finding", "examine"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`ready` means that no finding is a blocker. Findings stand in the order of the questions."""

    distribution: str
    ready: bool
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, object]:
        return {
            "distribution": self.distribution,
            "ready": self.ready,
            "findings": [finding.as_json() for finding in self.findings],
        }

    def worst_first(self) -> tuple[Finding, ...]:
        """For people: what must be done before what is fine."""
        return tuple(sorted(self.findings, key=lambda finding: -SEVERITIES.index(finding.severity)))


def examine(host: Host, inventory: Inventory) -> Diagnosis:
    """Examine a host. Reads only; what cannot be told is a finding of its own."""
    distribution = read_distribution(host)
    findings = (
        *examine_iommu(host, distribution),
        *examine_kernel(host, distribution),
        *examine_conflicts(host, inventory),
    )
    return Diagnosis(
        distribution=distribution.name,
        ready=all(finding.severity != "blocker" for finding in findings),
        findings=findings,
    )
