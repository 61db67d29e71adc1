"""What a twin cannot have of its original, and what of a comparison each lack explains. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What is compared of a device.
GROUP = ("group", "group members", "viable")
ROLE, VERDICT, BLOCKERS, PLAN = "role", "verdict", "blockers", "plan"
_JUDGED = (VERDICT, BLOCKERS, PLAN)


@dataclass(frozen=True, slots=True)
class LackKind:
    """One thing that a twin cannot have: why not, and where the two may differ because of it."""

    name: str
    why: str
    explains: tuple[str, ...] = ()


LACKS = {
    kind.name: kind
    for kind in (
        LackKind("host-bridge", "the host bridge is QEMU's"),
        LackKind(
            "further-host-bridge",
            "one host bridge a root bus, without a function of its own",
            (*GROUP, *_JUDGED),
        ),
        LackKind("iommu-function", "the IOMMU's function is QEMU's", (*GROUP, *_JUDGED)),
        LackKind("chipset", "slot 1f of the root bus is QEMU's chipset", (ROLE, *GROUP, *_JUDGED)),
        LackKind("lab", "the lab has devices of its own in slot 1e", (ROLE, *GROUP, *_JUDGED)),
        LackKind("slot", "slots 00, 1e and 1f of the root bus are taken"),
        LackKind("no-room", "the root bus has 32 slots", (*GROUP, *_JUDGED)),
        LackKind("function-0", "a slot needs a function 0"),
        LackKind("domain", "QEMU has domain 0 alone", GROUP),
        LackKind("bus-number", "buses are numbered by the twin's firmware"),
        LackKind("numa", "q35 tells no NUMA node for its own root bus"),
        LackKind("reserved", "direct reserved regions are the firmware's", _JUDGED),
        LackKind(
            "no-group",
            "behind a virtio IOMMU a device gets its group when a driver first looks at it",
            (*GROUP, *_JUDGED),
        ),
        LackKind("iommu-width", "QEMU's IOMMU has 39 or 48 bits"),
        LackKind(
            "virtual-functions",
            "QEMU hides the SR-IOV capability of a replayed card",
            (*GROUP, *_JUDGED),
        ),
        LackKind("config", "what was not in the snapshot cannot be replayed", (*GROUP, *_JUDGED)),
        LackKind("left-out", "what is below what is left out is left out", (*GROUP, *_JUDGED)),
        LackKind("bridge", "QEMU has some bridges in some places alone", (*GROUP, *_JUDGED)),
        LackKind("switch-acs", "QEMU's switch ports have no ACS", (*GROUP, *_JUDGED)),
        LackKind(
            "pin", "Linux knows its pin to be broken, and no stand-in driver holds it with one"
        ),
        LackKind("stand-in", "no driver works on a replayed card"),
        LackKind(
            "use",
            "uses other than disks and network cards are not acted out",
            (VERDICT, BLOCKERS, PLAN),
        ),
    )
}

# Blockers that say the same of a disk or of a network card that is in use: one is acted out.
FAMILIES = {
    "mounted": "disk in use",
    "swap": "disk in use",
    "storage-member": "disk in use",
    "route": "network card in use",
    "bridge-or-bond": "network card in use",
    "packet-socket": "network card in use",
    "traffic-rule": "network card in use",
}
# What a twin has no such use of; `unseen` is a snapshot's alone.
NOT_ACTED = frozenset(
    {
        "boot-vga",
        "console",
        "crypto-engine",
        "display",
        "dma-engine",
        "input",
        "mdev-children",
        "open-file",
        "random-source",
        "reserved-direct",
        "unseen",
        "vfs-enabled",
        "watchdog",
    }
)


@dataclass(frozen=True, slots=True)
class TwinLack:
    """What this twin lacks: a kind of `LACKS`, and a sentence with the original's addresses."""

    kind: str
    line: str

    def explains(self, what: str, addresses: set[str]) -> bool:
        """Whether it is why `what` differs of one of these addresses."""
        return what in LACKS[self.kind].explains and any(one in self.line for one in addresses)
