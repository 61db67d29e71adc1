"""The step on a VF's network settings, which its physical function's driver holds.

Source: include/uapi/linux/if_link.h, IFLA_VF_*; ip-link(8), `vf`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from vfiotool.change.steps.base import Step, Taken, Writer, device_keys, drifted
from vfiotool.change.steps.names import require_address
from vfiotool.errors import KernelError, NotFound
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_NET, SYS_PCI_DEVICES
from vfiotool.netlink.route import VfSettings, read_vf_settings, set_vf

SETTINGS = tuple(field.name for field in fields(VfSettings) if field.name != "index")


def interface_of(host: Host, pf: str) -> int | None:
    """The index of a physical function's first network interface, or None if it has none."""
    for name in host.listdir(f"{SYS_PCI_DEVICES}/{pf}/net"):
        index = host.read_int(f"{SYS_NET}/{name}/ifindex")
        if index is not None:
            return index
    return None


def read_settings(host: Host, pf: str) -> tuple[VfSettings, ...] | None:
    """What the PF's driver holds for its VFs; None without an interface or off the running host.

    A fake kernel answers through its tree's `vf_settings`.
    """
    index = interface_of(host, pf)
    if index is None:
        return None
    fake = getattr(host.tree, "vf_settings", None)
    if fake is not None:
        return tuple(fake(index))
    return read_vf_settings(index) if host.live else None


def wanted_of(found: VfSettings, wanted: VfSettings) -> VfSettings:
    """`found` reduced to the settings that `wanted` names."""
    return _keep(found, [name for name in SETTINGS if getattr(wanted, name) is not None])


def _keep(settings: VfSettings, names: Iterable[str]) -> VfSettings:
    """Those settings alone, the others as None: not touched."""
    values: dict[str, Any] = {name: getattr(settings, name) for name in names}
    return VfSettings(settings.index, **values)


@dataclass(frozen=True)
class SetVfProperty(Step):
    """MAC, VLAN, trust, spoof check, rates of one VF. None in `before` and `after`: not touched.

    With `keep` it changes nothing when it runs: it holds what undoing must give back to a VF that
    the plan destroys.
    """

    verb: ClassVar[str] = "set-vf-property"
    nested: ClassVar[dict[str, type]] = {"before": VfSettings, "after": VfSettings}
    pf: str
    index: int
    before: VfSettings
    after: VfSettings
    keep: bool = False
    undoing: bool = False

    @property
    def target(self) -> str:
        return f"{self.pf} vf {self.index}"

    def ends(self) -> tuple[object, object]:
        return _words(self.before), _words(self.after)

    def undo_text(self) -> str | None:
        known = self.before != VfSettings(self.index)
        return f"set {_words(self.before)}" if known else None

    def inverse(self) -> Step:
        return replace(self, before=self.after, after=self.before, undoing=not self.undoing)

    def present(self, host: Host) -> bool:
        return self._find(host) is not None

    def check(self, host: Host, *, begun: bool = False) -> None:
        if self.keep:
            return
        found = self._read(host)
        if not self._between(found, begun):
            raise drifted(self.target, _words(found), _words(self.before), _words(self.after))

    def _between(self, found: VfSettings, begun: bool) -> bool:
        """Whether each setting is at one of its ends; any will do where the first is unknown.

        Half-way any will do where the second is, too: what was new with its VF has no way back.
        """
        return all(
            getattr(found, name) in (getattr(self.before, name), getattr(self.after, name))
            for name in SETTINGS
            if getattr(self.before, name) is not None
            and not (begun and getattr(self.after, name) is None)
        )

    def holds(self, host: Host) -> bool:
        if self.keep and not self.undoing:
            return True
        return wanted_of(self._read(host), self.after) == self.after

    def check_names(self) -> None:
        require_address(self.pf)

    def takes(self, host: Host) -> Iterator[Taken]:
        """The VF whose address, VLAN or rate is another afterwards."""
        if self._find(host) is None or self.holds(host):
            return
        vf = host.linkname(f"{SYS_PCI_DEVICES}/{self.pf}/virtfn{self.index}")
        if vf is not None:
            yield Taken(vf)

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, "pci", self.pf)

    def outlives(self, host: Host, later: Step) -> bool:
        return later.remakes_vfs_of != self.pf

    @property
    def sets_vfs_of(self) -> str | None:
        return None if self.keep else self.pf

    def run(self, writer: Writer) -> None:
        if self.holds(writer.host):
            return
        found = self._read(writer.host)
        # What is right already is left alone: not every driver takes every setting.
        differing = [name for name in SETTINGS if getattr(found, name) != getattr(self.after, name)]
        index = interface_of(writer.host, self.pf)
        if index is None:
            raise self._gone()
        writer.send_netlink(set_vf(index, _keep(self.after, differing)))
        if not self.holds(writer.host):
            now = wanted_of(self._read(writer.host), self.after)
            raise KernelError(
                f"{self.target} reads {_words(now)} after {_words(self.after)} was set",
                device=self.pf,
            )

    def _find(self, host: Host) -> VfSettings | None:
        found = read_settings(host, self.pf) or ()
        return next((vf for vf in found if vf.index == self.index), None)

    def _read(self, host: Host) -> VfSettings:
        found = self._find(host)
        if found is None:
            raise self._gone()
        return found

    def _gone(self) -> NotFound:
        return NotFound(
            f"{self.pf} has no network interface that knows a VF {self.index}",
            hint="its driver must be loaded and the VF enabled",
            device=self.pf,
        )


def _words(settings: VfSettings) -> str:
    named = ((name, getattr(settings, name)) for name in SETTINGS)
    words = (f"{name} {_word(value)}" for name, value in named if value is not None)
    return ", ".join(words) or "as it is"


def _word(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)
