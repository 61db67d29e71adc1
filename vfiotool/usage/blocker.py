"""What a user of a device is called, and what follows from each kind of use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockerKind:
    """One kind of blocker. All that is known of a kind as such is known here.

    `says` in words; `seen` where it is looked up (docs/why.md); `cuts_a_use`: taking the device
    ends something that the host does, so a change is refused unless it is allowed by name;
    `ends_with_driver`: it ends when the driver lets go, and in no other way, so that binding is
    told to cut it off; `can_be_mended`: some command leads to the goal all the same; `holds`: it
    keeps a virtual machine from opening a device that is on a VFIO driver already;
    `can_be_allowed`: `--allow` permits it, since the change ends then, and what is lost is known;
    `order`: of the commands that end uses, those of the lowest number come first.
    """

    name: str
    says: str
    seen: str
    cuts_a_use: bool = True
    ends_with_driver: bool = False
    can_be_mended: bool = True
    holds: bool = False
    can_be_allowed: bool = True
    order: int = 9


KINDS = {
    kind.name: kind
    for kind in (
        BlockerKind(
            "mounted",
            "a file system on it is mounted",
            "mount tables of all mount namespaces, followed through partitions, LVM, MD, "
            "dm-crypt, multipath, bcache, loop devices; every member of a btrfs or bcachefs; "
            "virtio-9p and virtiofs by their tag",
            order=2,
        ),
        BlockerKind(
            "swap",
            "it holds swap space in use",
            "`/proc/swaps`: partitions, and files on its file systems",
            order=1,
        ),
        BlockerKind(
            "storage-member",
            "it is part of a volume, an array, a pool, or exported",
            "`holders` in sysfs, ZFS pools by udev's record, the kernel's NVMe target; and "
            "whatever else the kernel has claimed exclusively",
            order=3,
        ),
        BlockerKind(
            "route",
            "an interface of it has addresses or routes, or lives in another network namespace",
            "rtnetlink, the route tables, PPPoE, `/proc/*/ns/net`; the default route and your own "
            "SSH session are named",
            order=4,
        ),
        BlockerKind(
            "bridge-or-bond",
            "an interface of it belongs to a bridge, bond or team, or carries a VLAN or the like",
            "`master` and `upper_*` in sysfs",
            order=5,
        ),
        BlockerKind(
            "packet-socket",
            "a program takes packets straight from an interface of it, or is bound to it",
            "`/proc/net/packet`; XDP programs by rtnetlink; CAN sockets by `/proc/net/can`; "
            "sockets with SO_BINDTODEVICE by sock_diag",
            order=6,
        ),
        BlockerKind(
            "traffic-rule",
            "tc rules take packets from an interface of it, or send it packets of another",
            "filters of ingress and clsact, and mirred actions, by rtnetlink; BPF programs of tcx "
            "by bpf(2)",
            order=6,
        ),
        BlockerKind(
            "display",
            "it shows a picture",
            "lit DRM connectors, the console's frame buffer, firmware frame buffers in its BARs",
            ends_with_driver=True,
        ),
        BlockerKind(
            "boot-vga",
            "the firmware's display, until a VFIO driver has it",
            "`boot_vga`",
            ends_with_driver=True,
        ),
        BlockerKind(
            "console",
            "the kernel's console runs over it",
            "`/sys/class/tty/console/active`",
            ends_with_driver=True,
        ),
        BlockerKind(
            "input",
            "a keyboard or pointing device of the host is attached to it",
            "`/sys/class/input`, by the keys that each has",
            ends_with_driver=True,
        ),
        BlockerKind(
            "watchdog",
            "it has a watchdog that runs",
            "`/sys/class/watchdog/*/state`",
        ),
        BlockerKind(
            "dma-engine",
            "the kernel uses a DMA channel of it",
            "`/sys/class/dma/*/in_use`",
            ends_with_driver=True,
        ),
        BlockerKind(
            "random-source",
            "the kernel takes random numbers from it",
            "`/sys/class/misc/hw_random/rng_current`",
            ends_with_driver=True,
        ),
        BlockerKind(
            "crypto-engine",
            "the kernel encrypts with it: dm-crypt, IPsec, kernel TLS, af_alg",
            "`/proc/crypto`, by its driver's module",
        ),
        BlockerKind(
            "connected",
            "something is connected through it, or another machine has a part of it",
            "USB devices that USB/IP exports, Bluetooth connections, authorized Thunderbolt "
            "devices, vsock sockets, the kernel's device links",
        ),
        BlockerKind(
            "platform",
            "the host runs on it: an IOMMU as a PCI function, memory that the kernel has from it",
            "`/sys/class/iommu`, the class code, CXL regions, `/sys/bus/dax/devices`, virtio-mem",
            can_be_mended=False,
            can_be_allowed=False,
        ),
        BlockerKind(
            "open-file",
            "a process has a node of it open",
            "`/proc/*/fd`: device nodes, PCI resource files, its VFIO group",
            holds=True,
            order=0,
        ),
        BlockerKind(
            "vfs-enabled",
            "it has virtual functions enabled",
            "`virtfn*`; the drivers of the VFs are named",
            order=10,
        ),
        BlockerKind(
            "mdev-children",
            "mediated devices are made from it",
            "`/sys/bus/mdev/devices`",
        ),
        BlockerKind(
            "vdpa-children",
            "vDPA devices are made from it",
            "`/sys/bus/vdpa/devices`, with the driver that has each",
        ),
        BlockerKind(
            "no-server",
            "it is a VDUSE device whose server is gone or does not answer: detaching it would hang",
            "`/sys/class/vduse`, `/proc/*/fd`, the disk's `inflight`",
            holds=True,
            can_be_allowed=False,
            order=0,
        ),
        BlockerKind(
            "unseen",
            "something could not be looked at, so that it may be in use",
            "every look that failed, was refused or was cut short; and a network or storage "
            "function that a driver of the host has, of which nothing can be seen",
            holds=True,
            order=8,
        ),
        BlockerKind(
            "no-iommu",
            "no IOMMU translates for it",
            "`/sys/class/iommu` and the groups, never words on the command line",
            cuts_a_use=False,
            can_be_mended=False,
        ),
        BlockerKind(
            "no-interrupt-remapping",
            "its interrupts are not isolated, so VFIO refuses the group",
            "`/proc/interrupts`",
            cuts_a_use=False,
        ),
        BlockerKind(
            "reserved-direct",
            "the firmware demands direct memory access for it",
            "the group's `reserved_regions`",
            cuts_a_use=False,
            can_be_mended=False,
        ),
        BlockerKind(
            "group-member",
            "another device of its group is on a driver of the host",
            "the group; what uses that device is listed too. A bridge whose own driver stands in "
            "the way (shpchp, lpc_ich) is left without one: `bind BRIDGE --driver none`",
            cuts_a_use=False,
        ),
        BlockerKind(
            "no-driver",
            "no VFIO driver takes it: a bridge, a device on vfio-pci's deny list, a kernel "
            "without vfio-pci",
            "the class code, the ids, `/lib/modules`",
            cuts_a_use=False,
            can_be_mended=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why a device cannot be handed over.

    `kind` is one of KINDS; `device` the PCI address or mdev UUID that has the problem;
    `subject` what exactly is in use (a mount point, a swap area, an interface, a node), by which
    a policy can allow it; `detail` a sentence; `evidence` where one can check it; `remedy` a
    command that ends the use, where there is one. `vital`: where the host or the caller would be
    cut off at once without it, a sentence that says so; no command that ends it is offered.
    """

    kind: str
    device: str
    subject: str
    detail: str
    evidence: str
    remedy: str | None = None
    vital: str | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "device": self.device,
            "subject": self.subject,
            "detail": self.detail,
            "evidence": self.evidence,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Everything that uses a device, and what this tree does not tell.

    What could not be looked at is a blocker of the kind `unseen`; `unknown` names what a tree that
    is not the running machine does not hold.
    """

    blockers: tuple[Blocker, ...]
    unknown: tuple[str, ...] = ()
