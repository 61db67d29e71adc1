"""The step on a network card's eswitch mode (networking/devlink/devlink-eswitch-attr.rst)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vfiotool.change.steps.base import (
    Step,
    Taken,
    Writer,
    check_identity,
    device_keys,
    drifted,
    pf_nodes,
)
from vfiotool.change.steps.names import require_address
from vfiotool.change.steps.state import UNKNOWN, Identity, device_exists
from vfiotool.devices.sriov import read_eswitch_mode, read_vfs
from vfiotool.errors import KernelError
from vfiotool.host.host import Host


@dataclass(frozen=True)
class SetEswitchMode(Step):
    """Switch a card's VFs by itself (`legacy`) or as ports of the host's kernel (`switchdev`).

    `before` is None where the plan was made on a host that does not tell it; nothing is put back
    then. Which VFs there may be at that moment is the driver's own rule: see sriov_plan.py.
    """

    verb: ClassVar[str] = "set-eswitch-mode"
    nested: ClassVar[dict[str, type]] = {"identity": Identity}
    pf: str
    before: str | None
    after: str
    identity: Identity = UNKNOWN

    @property
    def target(self) -> str:
        return self.pf

    def ends(self) -> tuple[object, object]:
        return self.before, self.after

    def words(self) -> tuple[str, str]:
        return self.before or "unknown", self.after

    def undo_text(self) -> str | None:
        return None if self.before is None else f"set {self.before}"

    def inverse(self) -> Step | None:
        if self.before is None:
            return None
        return replace(self, before=self.after, after=self.before)

    def present(self, host: Host) -> bool:
        return device_exists(host, "pci", self.pf)

    def check(self, host: Host, *, begun: bool = False) -> None:
        check_identity(host, self.pf, self.identity)
        found = read_eswitch_mode(host, self.pf)
        if self.before is not None and found not in (self.before, self.after):
            raise drifted(f"{self.pf} eswitch", found, self.before, self.after)

    def holds(self, host: Host) -> bool:
        return read_eswitch_mode(host, self.pf) == self.after

    def check_names(self) -> None:
        require_address(self.pf)

    def takes(self, host: Host) -> Iterator[Taken]:
        """The VFs: their traffic goes another way from then on."""
        if not self.holds(host):
            yield from (Taken(vf.address) for vf in read_vfs(host, self.pf))

    def lock_keys(self, host: Host) -> set[str]:
        return device_keys(host, "pci", self.pf)

    def nodes(self, host: Host) -> tuple[str, ...]:
        return pf_nodes(host, self.pf)

    @property
    def sets_vfs_of(self) -> str | None:
        return self.pf

    def run(self, writer: Writer) -> None:
        from vfiotool.host.family import family_number
        from vfiotool.netlink.devlink import FAMILY, set_eswitch

        if self.holds(writer.host):
            return
        family = family_number(writer.host, FAMILY)
        if family is None:
            raise KernelError(
                f"{self.pf}: this kernel has no devlink (CONFIG_NET_DEVLINK)", device=self.pf
            )
        writer.send_netlink(set_eswitch(family, self.pf, self.after))
        found = read_eswitch_mode(writer.host, self.pf)
        if found != self.after:
            raise KernelError(
                f"{self.pf}: its eswitch is in mode {found} after {self.after} was set",
                device=self.pf,
            )
