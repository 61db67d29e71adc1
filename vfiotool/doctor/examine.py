"""Is this host ready to hand devices over: findings with evidence, remedy and page."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vfiotool.devices.inventory import Inventory
from vfiotool.doctor.conflicts import judge_conflicts
from vfiotool.doctor.facts import DoctorFacts, read_facts
from vfiotool.doctor.finding import SEVERITIES, Finding, merged
from vfiotool.doctor.iommu import judge_iommu
from vfiotool.doctor.kernel import judge_kernel
from vfiotool.host.host import Host

__all__ = ["Diagnosis", "Finding", "examine", "judge"]


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

    def for_people(self) -> tuple[Finding, ...]:
        """What must be done before what is fine, and what has one cause as one finding.

        A page is named by the first finding that refers to it.
        """
        ranked = sorted(self.findings, key=lambda finding: -SEVERITIES.index(finding.severity))
        named: set[str | None] = set()
        found = []
        for finding in merged(ranked):
            if finding.page in named:
                finding = replace(finding, page=None)
            elif finding.severity != "ok":
                named.add(finding.page)
            found.append(finding)
        return tuple(found)


def examine(host: Host, inventory: Inventory) -> Diagnosis:
    """Examine a host. Reads only; what cannot be told is a finding of its own."""
    return judge(read_facts(host, inventory))


def judge(facts: DoctorFacts) -> Diagnosis:
    """The diagnosis that follows from the facts."""
    findings = (*judge_iommu(facts), *judge_kernel(facts), *judge_conflicts(facts.claims))
    return Diagnosis(
        distribution=facts.distribution.name,
        ready=all(finding.severity != "blocker" for finding in findings),
        findings=findings,
    )
