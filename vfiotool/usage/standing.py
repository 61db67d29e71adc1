"""How every device of a host stands: its verdict in one word, and what stands in its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vfiotool.devices.iommu import IommuGroup
from vfiotool.devices.pci import PciFunction
from vfiotool.host.host import Host
from vfiotool.usage.blocker import Blocker
from vfiotool.usage.case import Case, CaseReader
from vfiotool.usage.verdict import judge, word_of

# So many texts of blockers are kept.
_TEXTS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Standing:
    """One device's verdict (`ready`, `available`, `blocked`) and its blockers."""

    verdict: str
    blockers: tuple[Blocker, ...]

    def as_json(self) -> dict[str, object]:
        """As `devices` and `show` carry it."""
        return {
            "verdict": self.verdict,
            "blockers": [blocker.as_json() for blocker in self.blockers],
        }


class StandingWriter:
    """Writes one standing after another as JSON text; what stands in the way of many devices, such
    as a member of their group, is encoded once."""

    def __init__(self) -> None:
        from json import JSONEncoder

        self._encode = JSONEncoder().encode
        # By identity: the blockers of a group are the same for each of its members.
        self._texts: dict[int, tuple[Blocker, str]] = {}

    def text(self, standing: Standing) -> str:
        """The members of `Standing.as_json`, each with a comma after it."""
        blockers = ", ".join([self._blocker(blocker) for blocker in standing.blockers])
        return f'"verdict": "{standing.verdict}", "blockers": [{blockers}], '

    def _blocker(self, blocker: Blocker) -> str:
        known = self._texts.get(id(blocker))
        if known is None:
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.clear()
            known = self._texts[id(blocker)] = (blocker, self._encode(blocker.as_json()))
        return known[1]


class Standings:
    """Judges one device after another by one look at the host, as `why` would.

    Functions and groups that were read already are taken as they are.
    """

    def __init__(
        self,
        host: Host,
        functions: Mapping[str, PciFunction] | None = None,
        groups: Mapping[int, IommuGroup] | None = None,
    ) -> None:
        self._cases = CaseReader(host, functions, groups, types=False)
        # How many devices nothing stands against but that somebody else than root looked.
        self.unseen = 0

    def of(self, function: PciFunction) -> Standing:
        """A function's standing."""
        return self._judge(self._cases.of(function))

    def named(self, name: str) -> Standing:
        """That of a PCI function (full address) or mdev (UUID). Raises NotFound."""
        return self._judge(self._cases.read(name))

    def _judge(self, case: Case) -> Standing:
        found = judge(case)
        unprivileged = case.facts.privileged is False
        self.unseen += unprivileged and bool(found) and {b.kind for b in found} == {"unseen"}
        return Standing(word_of(case, found), found)
