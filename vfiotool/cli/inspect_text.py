"""What `devices`, `show` and `why` print for people. All text from devices is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from vfiotool.cli import render
from vfiotool.cli.groups import one_line
from vfiotool.cli.inspect_capabilities import summary
from vfiotool.host import Host
from vfiotool.inventory_show import ShownFunction, ShownMdev
from vfiotool.iommu import IommuGroup, role_of
from vfiotool.names import read_names
from vfiotool.pci import Link, PciFunction, Region, read_functions

if TYPE_CHECKING:
    from rich.console import Console

    from vfiotool.verdict import Verdict

_PIPE_WIDTH = 512
_ROLE_STYLES = {"vfio": "green", "unbound": "", "bridge": "dim", "host": "yellow", "mdev": "cyan"}
_ROLES = {
    "vfio": "ready for user space",
    "unbound": "no driver",
    "bridge": "not in the way",
    "host": "in use by the host",
    "mdev": "mediated device",
}
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def print_devices(host: Host, chosen: Iterable[str]) -> None:
    """One line a function: where it is, what it is, who has it."""
    names = read_names(host)
    rows = [("ADDRESS", "ID", "GROUP", "DRIVER", "NAME")]
    for function in read_functions(host, chosen, links=False):
        known = names.lookup(function.vendor, function.device, class_code=function.class_code)
        parts = (known.vendor, known.device or known.class_name)
        rows.append(
            (
                function.address,
                f"{function.vendor}:{function.device}",
                "-" if function.iommu_group is None else str(function.iommu_group),
                one_line(function.driver or "-"),
                one_line(" ".join(part for part in parts if part)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    console = _console()
    for number, row in enumerate(rows):
        cells = [f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False)]
        style = "" if row[3] == "-" else _ROLE_STYLES[role_of(row[3])]
        line = Text.assemble("".join(cells[:3]), (cells[3], style), row[4])
        if number == 0:
            line.stylize("bold")
        line.rstrip()
        console.print(line)


def print_shown(shown: ShownFunction | ShownMdev) -> None:
    """Everything about one device, in paragraphs."""
    console = _console()
    if isinstance(shown, ShownMdev):
        mdev = shown.mdev
        console.print(Text(mdev.uuid, style="bold"))
        _facts(
            console,
            [
                ("parent", mdev.parent),
                ("type", mdev.type),
                ("driver", shown.driver or "none"),
                ("VFIO node", shown.group_node),
            ],
        )
    else:
        _print_function(console, shown)
    _print_group(console, shown.group)


def _print_function(console: Console, shown: ShownFunction) -> None:
    function = shown.function
    known = shown.names.lookup(
        function.vendor,
        function.device,
        function.subsystem_vendor,
        function.subsystem_device,
        function.class_code,
    )
    title = " ".join(part for part in (known.vendor, known.device) if part) or "unknown device"
    console.print(
        Text.assemble(
            (function.address, "bold"),
            f"  {one_line(title)} [{function.vendor}:{function.device}]",
            f" rev {function.revision}",
        )
    )
    subsystem = f"{function.subsystem_vendor}:{function.subsystem_device}"
    facts = [
        ("class", f"{known.class_name or 'unknown'} [{function.class_code}]"),
        ("subsystem", f"{known.subsystem or ''} [{subsystem}]".strip()),
        ("driver", function.driver or "none"),
        ("override", function.driver_override),
        ("slot", shown.details.slot),
        ("label", function.label),
        ("NUMA node", function.numa_node),
        ("power", _power(function)),
        ("boot display", "yes" if function.boot_vga else None),
        ("link", None if shown.details.link is None else _link(shown.details.link)),
        ("resets", ", ".join(function.reset_methods) or "none"),
    ]
    _facts(console, [*facts, *_passing(shown), *_children(shown)])
    if function.regions:
        console.print(Text("regions", style="bold"))
        for region in function.regions:
            console.print(Text(f"  {_region(region)}"))
    _print_capabilities(console, shown)
    _print_vpd(console, shown)


def _passing(shown: ShownFunction) -> list[tuple[str, object]]:
    function, details = shown.function, shown.details
    nodes = [node for node in (details.group_node, details.device_node) if node is not None]
    return [
        ("IOMMU", function.iommu or "none"),
        ("VFIO driver", details.vfio_driver or "none available"),
        ("VFIO nodes", ", ".join(nodes) or None),
    ]


def _children(shown: ShownFunction) -> list[tuple[str, object]]:
    function, details, sriov = shown.function, shown.details, shown.function.sriov
    counts = None if sriov is None else f"{sriov.num_vfs} of {sriov.total_vfs} VFs"
    if counts is not None and details.vfs:
        counts += f": {', '.join(details.vfs)}"
    physfn = None if function.physfn is None else f"VF {function.vf_index} of {function.physfn}"
    types = ", ".join(f"{item.type} ({item.available_instances})" for item in shown.mdev_types)
    return [
        ("SR-IOV", counts or physfn),
        ("mdev types", types or None),
        ("mdevs", ", ".join(details.mdevs) or None),
        ("vDPA", ", ".join(details.vdpas) or None),
    ]


def _print_capabilities(console: Console, shown: ShownFunction) -> None:
    config = shown.details.config
    if config is None:
        console.print(Text("configuration space cannot be read", style="yellow"))
        return
    if not config.complete and config.header is not None:
        text = f"capabilities: only {config.size} bytes are readable; the rest needs root"
        console.print(Text(text, style="yellow"))
    for problem in config.problems:
        console.print(Text(f"configuration space: {problem}", style="yellow"))
    if config.capabilities:
        console.print(Text("capabilities", style="bold"))
    for capability in config.capabilities:
        version = "" if capability.version is None else f" v{capability.version}"
        line = f"  {capability.offset:#05x}  {capability.title}{version}"
        console.print(Text.assemble(line, (f"  {summary(capability)}", "dim")))


def _print_vpd(console: Console, shown: ShownFunction) -> None:
    if shown.vpd is None:
        return
    console.print(Text(f"vital product data  {shown.vpd.name or ''}", style="bold"))
    for keyword, value in shown.vpd.fields:
        console.print(Text(f"  {keyword}  {value}"))
    for problem in shown.vpd.problems:
        console.print(Text(f"  {problem}", style="yellow"))


def print_verdict(verdict: Verdict) -> None:
    """Yes or no, every reason with its evidence, and the commands to type next."""
    console = _console()
    answer = ("can be passed through", "bold green")
    if not verdict.passable:
        answer = ("cannot be passed through yet", "bold red")
    console.print(Text.assemble((verdict.address, "bold"), " ", answer))
    for blocker in verdict.blockers:
        line = Text.assemble((f"  {blocker.kind}", "red"), f"  {one_line(blocker.detail)}")
        console.print(line)
        console.print(Text(f"      {one_line(blocker.evidence)}", style="dim"))
    for note in verdict.notes:
        console.print(Text(f"  note: {one_line(note)}"))
    _print_group(console, verdict.group)
    if verdict.next:
        console.print(Text("next", style="bold"))
    for command in verdict.next:
        console.print(Text(f"  {one_line(command)}", style="cyan"))


def _print_group(console: Console, group: IommuGroup | None) -> None:
    if group is None:
        console.print(Text("in no IOMMU group", style="yellow"))
        return
    state = ("viable", "green") if group.viable else ("not viable", "yellow")
    console.print(Text.assemble((f"group {group.id}", "bold"), f"  {group.type or '-'}  ", state))
    width = max((len(member.address) for member in group.devices), default=0)
    for member in group.devices:
        what = _ROLES[member.role]
        text = f"  {member.address:<{width}}  {member.driver or '-'} ({what})"
        console.print(Text(one_line(text), style=_ROLE_STYLES[member.role]))
    for region in group.reserved_regions:
        console.print(
            Text(f"  reserved {region.start:#x}-{region.end:#x} {region.type}", style="dim")
        )


def _facts(console: Console, facts: Iterable[tuple[str, object]]) -> None:
    for name, value in facts:
        if value is not None:
            console.print(Text.assemble((f"  {name:<13}", "dim"), one_line(str(value))))


def _power(function: PciFunction) -> str | None:
    if function.power_state is None:
        return None
    cold = {True: ", D3cold allowed", False: ", D3cold not allowed", None: ""}
    return function.power_state + cold[function.d3cold_allowed]


def _link(link: Link) -> str:
    now = f"{_number(link.speed_gts)} GT/s x{_number(link.width)}"
    return f"{now}, at best {_number(link.max_speed_gts)} GT/s x{_number(link.max_width)}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


def _region(region: Region) -> str:
    name = "ROM" if region.index == 6 else f"BAR {region.index}"
    kind = "I/O" if region.kind == "io" else f"memory, {region.bits} bits"
    prefetchable = ", prefetchable" if region.prefetchable else ""
    return f"{name:<6} {region.start:#014x}  {_size(region.size):>8}  {kind}{prefetchable}"


def _size(size: int) -> str:
    power = 0
    while size >= 1024 and size % 1024 == 0 and power < len(_UNITS) - 1:
        size //= 1024
        power += 1
    return f"{size} {_UNITS[power]}B"


def _console() -> Console:
    console = render.console()
    if not console.is_terminal:
        # A pipe has no width: what a program reads must not be cut off or wrapped.
        console.width = _PIPE_WIDTH
    return console
