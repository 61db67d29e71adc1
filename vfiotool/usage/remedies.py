"""What to type next: the steps that lead to a device in a virtual machine, or why there are none.

A step is offered only if the goal can be reached after it. So nothing that ends a use is offered
beside a use that has to stay, beside a device that no VFIO driver takes, without an IOMMU; nothing
that takes the device asked about away; and where a blocker has no step, a note says so. All of it
follows from frozen values.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from vfiotool.devices.attached import is_part_of
from vfiotool.devices.pci import PciFunction
from vfiotool.host.distribution import Distribution
from vfiotool.usage.blocker import KINDS, Blocker
from vfiotool.usage.case import Case, HostFacts

# Firmware frame buffers: no driver of the card lets go of them (usage/display.py).
_FIRMWARE_BUFFERS = ("BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer")
_NO_FRAME_BUFFER = "initcall_blacklist=sysfb_init"


@dataclass(frozen=True, slots=True)
class Advice:
    """`steps`: commands to type in this order; `warnings`: what has to stay, and what taking it
    would do; `notes`: why there is no step, and what else leads to the goal."""

    steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def advise(case: Case, blockers: tuple[Blocker, ...]) -> Advice:
    """The steps for a device that these stand against, in the order in which they are typed.

    Members of the group that are missing among the case's neighbours are no PCI functions, and
    cannot be bound along.
    """
    if case.function is None:
        return _advise_mdev(case, blockers)
    function = case.function
    warnings = tuple(dict.fromkeys(_vital_use_warnings(blockers)))
    ends = [*_dead_ends(case, function, blockers)]
    if warnings or ends:
        ends += _another_way(function, blockers, case.neighbours)
        return Advice((), warnings, tuple(dict.fromkeys(ends)))
    if _root_sees_more(case.facts, blockers):
        note = "what root can see alone was not looked at; nothing else can be said before"
        return Advice((f"sudo vfiotool why {function.address}",), (), (note,))
    shows = [b.remedy for b in blockers if b.kind == "unseen" and b.remedy is not None]
    if shows:
        note = "this makes visible what may use it, and changes nothing else; then ask again"
        shows.append(f"vfiotool why {function.address}")
        return Advice(tuple(dict.fromkeys(shows)), (), (note,))
    ended = (*_what_the_steps_end(blockers), *_what_goes_along(case, function))
    notes = tuple(dict.fromkeys(ended))
    first = _platform_steps(blockers, case.facts)
    if first:
        return Advice(first)
    steps = [*_ending_steps(blockers)]
    steps += _frame_buffer_steps(function, blockers, case.facts.distribution)
    if steps[-1:] == ["reboot"]:
        return Advice(tuple(dict.fromkeys(steps)))
    bridges = () if case.group is None else case.group.bridges_in_the_way
    steps += [f"vfiotool bind {name} --driver none" for name in bridges]
    along = [name for name in _other_hosts(case, function) if name not in bridges]
    if not function.on_vfio or along:
        steps.append(_bind_command(function.address, blockers, whole_group=bool(along)))
    steps += [f"vfiotool vm check {function.address}", f"vfiotool vm qemu {function.address}"]
    return Advice(tuple(dict.fromkeys(steps)), (), notes)


def _root_sees_more(facts: HostFacts, blockers: Iterable[Blocker]) -> bool:
    """Whether something was not seen, and somebody else than root looked."""
    return facts.privileged is False and any(blocker.kind == "unseen" for blocker in blockers)


def _what_the_steps_end(blockers: Iterable[Blocker]) -> Iterable[str]:
    """What a step takes away without saying so in its own words."""
    for blocker in blockers:
        if blocker.kind in ("boot-vga", "console"):
            yield (
                f"binding {blocker.device} ends what its console shows: have another way in first "
                "(SSH, a serial line, another display)"
            )
        elif blocker.kind == "vfs-enabled" and blocker.remedy is not None:
            yield f"{blocker.remedy} removes all of its VFs, from virtual machines too"
        elif blocker.kind == "open-file" and blocker.remedy is not None:
            yield f"fuser only shows who has {blocker.subject} open: end that before the next step"


def _what_goes_along(case: Case, function: PciFunction) -> Iterable[str]:
    """What the host loses with a controller that makes a domain of its own (VMD)."""
    for name, other in case.neighbours.items():
        behind = name != function.address and is_part_of(function.path, other.path)
        if behind and other.driver is not None and not other.is_bridge:
            yield (
                f"{name} ({other.driver}) lies behind {function.address} and leaves the host with "
                "it"
            )


def _advise_mdev(case: Case, blockers: tuple[Blocker, ...]) -> Advice:
    """The steps for a mediated device, which needs no IOMMU and no binding of its own.

    One without a driver gets one only when it is made (drivers/vfio/mdev/mdev_driver.c), so it is
    made again.
    """
    uuid = case.name
    if _root_sees_more(case.facts, blockers):
        return Advice((f"sudo vfiotool why {uuid}",))
    steps = [*_ending_steps(blockers)]
    mdev = case.mdev
    driverless = any(blocker.kind == "no-driver" for blocker in blockers)
    if driverless and mdev is not None and mdev.parent is not None and mdev.type is not None:
        words = ("vfiotool", "mdev", "create", mdev.parent, mdev.type, "--uuid", uuid)
        steps.append(shlex.join(words))
    if not blockers:
        steps += [f"vfiotool vm check {uuid}", f"vfiotool vm qemu {uuid}"]
    return Advice(tuple(steps))


def _vital_use_warnings(blockers: Iterable[Blocker]) -> Iterable[str]:
    for blocker in blockers:
        if blocker.vital:
            yield blocker.vital


def _dead_ends(case: Case, function: PciFunction, blockers: tuple[Blocker, ...]) -> Iterable[str]:
    """Why the goal cannot be reached by any step: one sentence for each reason."""
    address = function.address
    own = [b for b in blockers if b.kind == "no-driver" and b.device == address]
    if own:
        yield f"no step: {own[0].detail}"
        return
    for blocker in blockers:
        kind = KINDS[blocker.kind]
        if blocker.kind == "vfs-enabled" and blocker.device == function.physfn:
            yield (
                f"{address} is a VF of {blocker.device}, in the same group: removing the VFs would "
                "remove it too, so there is no step while that PF is on a driver of the host; "
                "what helps is ACS between them (another slot, or the firmware's ACS setting), or "
                "the PF itself on vfio-pci with enable_sriov=1"
            )
        elif blocker.kind == "reserved-direct":
            yield (
                f"no step: the firmware keeps memory reserved for {blocker.device} (RMRR), which "
                "no kernel option lifts; look for a setting of this slot in the firmware's setup, "
                "or a firmware update"
            )
        elif not kind.can_be_mended and blocker.kind != "no-iommu":
            yield f"no step: {blocker.detail}"
        elif blocker.kind == "no-iommu" and case.facts.platform.works:
            yield (
                f"no step: no IOMMU of this host translates for {blocker.device}; where it is a "
                "card, another slot may be behind one"
            )
        elif blocker.kind == "unseen":
            if blocker.remedy is not None or _root_sees_more(case.facts, blockers):
                continue
            yield (
                f"no step until it can be told whether {blocker.device} is in use: root sees more, "
                "and the running machine more than a file of it"
            )
        elif _has_no_step(blocker):
            yield f"no step is known that ends it: {blocker.detail}; end it, then ask again"
    staying = {blocker.device for blocker in blockers if blocker.vital}
    yield from _members_that_stay(case, function, staying)


def _has_no_step(blocker: Blocker) -> bool:
    """A use that neither a command of its own nor the binding ends."""
    kind = KINDS[blocker.kind]
    ended = blocker.remedy is not None or kind.ends_with_driver
    return kind.cuts_a_use and not ended and blocker.vital is None


def _members_that_stay(
    case: Case, function: PciFunction, staying: Collection[str]
) -> Iterable[str]:
    for name in _other_hosts(case, function):
        other = case.neighbours.get(name)
        if other is None:
            yield f"no step: {name} in the same group is not a PCI function and cannot be bound"
        elif is_part_of(other.path, function.path):
            behind = f"{function.address} lies behind {name} ({other.driver}), in the same group"
            if name in staying:
                yield f"{behind}: it cannot be had without it"
            else:
                yield (
                    f"{behind}, and would go away with that driver: pass {name} through instead, "
                    "or switch it off in the firmware's setup (VMD)"
                )
        elif (outer := _outer_of(case, other)) is not None:
            yield (
                f"no step: {name} lies behind {outer}, both in the same group, and goes away when "
                f"{outer} does: they cannot be bound together; switch that one off in the "
                "firmware's setup (VMD)"
            )
        elif (other.class_code or "").startswith("0607"):
            yield f"no step: {name} in the same group is a CardBus bridge, which VFIO cannot take"


def _outer_of(case: Case, inner: PciFunction) -> str | None:
    """The other member on a driver of the host that a member is a part of, as behind VMD."""
    for name, other in case.neighbours.items():
        if name != inner.address and is_part_of(other.path, inner.path):
            return name
    return None


def _other_hosts(case: Case, function: PciFunction) -> list[str]:
    """The group's other members on a driver of the host, but for those that leave with this one."""
    members = () if case.group is None else case.group.devices
    names = [m.address for m in members if m.role == "host" and m.address != function.address]
    paths = {name: other.path for name, other in case.neighbours.items()}
    return [n for n in names if n not in paths or not is_part_of(function.path, paths[n])]


def _another_way(
    function: PciFunction, blockers: Iterable[Blocker], functions: Mapping[str, PciFunction]
) -> Iterable[str]:
    """What parts the device from neighbours that have to stay."""
    keepers = dict.fromkeys(blocker.device for blocker in blockers if blocker.vital)
    if function.address in keepers or function.physfn is not None or function.is_bridge:
        return
    card = function.address.rpartition(".")[0]
    staying = []
    for name in keepers:
        other = functions.get(name)
        if other is not None and is_part_of(function.path, other.path):
            yield f"{name} lies behind {function.address} and would go with it"
        elif name.rpartition(".")[0] == card:
            yield (
                f"{name} is a function of the same card and in the same group: no slot parts "
                "them, so use another card in another slot"
            )
        elif other is None or not is_part_of(other.path, function.path):
            staying.append(name)
    if staying:
        yield (
            f"in the same group and has to stay: {', '.join(staying)}; move the card to another "
            "slot (one wired to the processor has a group of its own more often)"
        )


def _platform_steps(blockers: Iterable[Blocker], facts: HostFacts) -> tuple[str, ...]:
    """What comes before anything else: without an IOMMU, or isolated interrupts, VFIO refuses."""
    kinds = {blocker.kind for blocker in blockers}
    if "no-iommu" in kinds:
        option = facts.platform.missing_option
        if option is not None:
            return (*facts.distribution.kernel_option(option), "reboot")
    return ("vfiotool doctor",) if kinds & {"no-iommu", "no-interrupt-remapping"} else ()


def _ending_steps(blockers: tuple[Blocker, ...]) -> Iterable[str]:
    """The commands that end each use, those that stand on others first."""
    ranked = sorted(
        enumerate(blockers),
        key=lambda pair: (
            KINDS[pair[1].kind].order,
            # Volumes are found from the disk upwards and taken down from the top.
            -pair[0] if pair[1].kind in ("storage-member", "mounted") else pair[0],
        ),
    )
    return [blocker.remedy for _, blocker in ranked if blocker.remedy is not None]


def _frame_buffer_steps(
    function: PciFunction, blockers: Iterable[Blocker], distribution: Distribution
) -> tuple[str, ...]:
    """A firmware frame buffer outlives the card's driver: only the next boot goes without it."""
    kept = any(
        blocker.kind == "display" and blocker.subject in _FIRMWARE_BUFFERS for blocker in blockers
    )
    if not kept or not function.on_vfio:
        return ()
    return (*distribution.kernel_option(_NO_FRAME_BUFFER), "reboot")


def _bind_command(address: str, blockers: Iterable[Blocker], *, whole_group: bool) -> str:
    """The command that takes the device, once what has a command of its own has been ended."""
    words = ["vfiotool", "bind", address, *(["--whole-group"] if whole_group else [])]
    for blocker in blockers:
        if blocker.remedy is None and KINDS[blocker.kind].ends_with_driver:
            words += ["--allow", f"{blocker.kind}:{blocker.subject}"]
    return shlex.join(words)
