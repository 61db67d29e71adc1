"""`vfiotool groups`: IOMMU groups, with their members and what each means for passthrough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, area, examples, host_of, wants_json
from vfiotool.cli.look.roles import ROLES, STYLES, VERDICTS, say_unseen
from vfiotool.devices.identity import list_groups
from vfiotool.devices.iommu import GroupMember, GroupWriter, IommuGroup, iter_groups, read_group
from vfiotool.devices.pci import Address
from vfiotool.errors import NotFound, Unsupported
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES, SYS_PCI_DEVICES

app = area()


@app.command(
    "groups",
    epilog=examples(
        "vfiotool groups", "vfiotool groups 12 net:eth0", "vfiotool groups --json | jq ."
    ),
)
def groups(
    context: typer.Context,
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID…",
            help=f"Only these groups, or those of these devices. {SELECTORS}",
            autocompletion=candidates.groups,
        ),
    ] = None,
) -> int:
    """List IOMMU groups: the type of their domain, whether they are viable, their members.

    The devices of a group can only be passed through together. A group is viable when no member
    is on a host driver: only then the kernel lets user space open it. Each member has a verdict:
    ready (a virtual machine can open it now), available (bind makes it ready), blocked (why DEVICE
    says what stands against it).
    """
    host = host_of(context)
    chosen = [number for text in ids or () for number in _numbers(host, text)]
    return run_groups(host, list(dict.fromkeys(chosen)), as_json=wants_json(context))


def _numbers(host: Host, text: str) -> list[int]:
    """The group of that number, or those of the devices that a selector names."""
    if text.isdecimal():
        return [int(text)]
    from vfiotool.devices.selector import resolve_all

    found = []
    for name in resolve_all(host, text):
        folder = SYS_PCI_DEVICES if Address.is_address(name) else SYS_MDEV_DEVICES
        link = host.linkname(f"{folder}/{name}/iommu_group")
        if link is None or not link.isdecimal():
            raise NotFound(f"{name} is in no IOMMU group", hint=f"vfiotool why {name}", device=name)
        found.append(int(link))
    return found


def run_groups(host: Host, ids: Sequence[int], as_json: bool) -> int:
    """Print the groups named, or all, and return the exit code.

    Raises Unsupported where the host has no groups at all, NotFound for an unknown id.
    """
    known = list_groups(host)
    if not known:
        raise no_groups(host)
    missing = sorted(set(ids) - set(known))
    if missing:
        text = ", ".join(str(group) for group in missing)
        raise NotFound(
            f"no IOMMU group {text}: the ids go from {known[0]} to {known[-1]}",
            hint="vfiotool groups lists them",
        )
    found = _read(host, ids) if ids else iter_groups(host, plain=True)
    if as_json:
        output.emit_rows("groups", map(GroupWriter().text, found))
    else:
        print_text(host, found)
    return 0


def _read(host: Host, ids: Sequence[int]) -> Iterator[IommuGroup]:
    """The groups that are there still."""
    for number in ids:
        group = read_group(host, number)
        if group is not None:
            yield group


def no_groups(host: Host) -> Unsupported:
    """Why there is nothing to pass through here, and the way out."""
    from vfiotool.devices.firmware import OPTION_THAT_ENABLES, iommu_tables
    from vfiotool.devices.platform import read_platform
    from vfiotool.host.distribution import read_distribution

    offered, platform = iommu_tables(host), read_platform(host)
    if platform.missing_option is not None:
        reason = f"the firmware offers an IOMMU ({', '.join(offered)}), the kernel does not use it"
        way = " && ".join(read_distribution(host).kernel_option(platform.missing_option))
        way += ", then reboot"
    elif platform.architecture in ("s390x", "ppc64"):
        reason = "no PCI device here is in one"
        way = "vfiotool doctor shows what the kernel has"
    elif offered:
        reason = f"the firmware offers an IOMMU ({', '.join(offered)}), the kernel does not use it"
        option = OPTION_THAT_ENABLES.get(offered[0]) or "no iommu=off or amd_iommu=off"
        way = f"boot with {option} on the kernel's command line"
    else:
        reason = "the firmware offers the kernel no IOMMU"
        way = (
            "switch on VT-d, AMD-Vi (IOMMU) or SMMU in the firmware's set-up, and boot an Intel "
            "machine with intel_iommu=on"
        )
    return Unsupported(
        f"no IOMMU groups: {reason}",
        hint=f"{way}; or see everything work without an IOMMU: vfiotool lab demo",
    )


def print_text(host: Host, groups: Iterator[IommuGroup]) -> None:
    """One paragraph a group: its domain type and whether it is viable, then its members with their
    verdicts and roles."""
    from vfiotool.devices.attached import Attached
    from vfiotool.devices.names import read_names
    from vfiotool.devices.pci import list_addresses, read_functions
    from vfiotool.usage.standing import Standings

    names, attached = read_names(host), Attached(host)
    functions = {
        function.address: function
        for function in read_functions(host, list_addresses(host), links=False)
    }
    standings = Standings(host, functions)
    for group in groups:
        state = ("viable", "green") if group.viable else ("not viable", "yellow")
        kind = "" if group.type is None else f"  {group.type}"
        output.write((f"group {group.id}", "bold"), f"{kind}  ", state)
        width = max((len(member.address) for member in group.devices), default=0)
        for member in group.devices:
            known = names.lookup(member.vendor, member.device, class_code=member.class_code)
            identity = "" if member.vendor is None else f"{member.vendor}:{member.device}"
            function = functions.get(member.address)
            verdict, parts = "-", ""
            if function is not None:
                if not function.is_bridge:
                    verdict = standings.of(function).verdict
                own = (*attached.interfaces(function.path), *attached.disks(function.path))
                parts = f"{', '.join(own)}  " if own else ""
            title = known.device or known.class_name or ""
            output.write(
                f"  {member.address:<{width}}  {identity:<9}  ",
                (f"{verdict:<9}", VERDICTS.get(verdict, "")),
                "  ",
                (f"{_what(member):<32}", STYLES[member.role]),
                f"  {parts}{title}",
            )
    say_unseen(standings, "groups")


def _what(member: GroupMember) -> str:
    words = ROLES[member.role]
    return words if member.driver is None else f"{member.driver} ({words})"
