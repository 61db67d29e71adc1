"""What `devices`, `show` and `why` print for people. All text from devices is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vfiotool.cli import output as render
from vfiotool.cli.look.show_capabilities import summary
from vfiotool.cli.style import escape_line
from vfiotool.devices.iommu import IommuGroup, role_of
from vfiotool.devices.names import read_names
from vfiotool.devices.pci import Link, PciFunction, Region, read_functions
from vfiotool.devices.show import ShownFunction, ShownMdev
from vfiotool.host.host import Host

if TYPE_CHECKING:
    from vfiotool.usage.verdict import Verdict

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
                escape_line(function.driver or "-"),
                escape_line(" ".join(part for part in parts if part)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for number, row in enumerate(rows):
        cells = [f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False)]
        if not row[4]:
            cells[3] = cells[3].rstrip()
        style = "" if row[3] == "-" else _ROLE_STYLES[role_of(row[3])]
        if number == 0:
            render.write(("".join([*cells, row[4]]).rstrip(), "bold"))
        else:
            render.write("".join(cells[:3]), (cells[3], style), row[4])


def print_shown(shown: ShownFunction | ShownMdev) -> None:
    """Everything about one device, in paragraphs."""
    if isinstance(shown, ShownMdev):
        mdev = shown.mdev
        render.write((mdev.uuid, "bold"))
        _facts(
            [
                ("parent", mdev.parent),
                ("type", mdev.type),
                ("driver", shown.driver or "none"),
                ("VFIO node", shown.group_node),
            ],
        )
    else:
        _print_function(shown)
    _print_group(shown.group)


def _print_function(shown: ShownFunction) -> None:
    function = shown.function
    known = shown.names.lookup(
        function.vendor,
        function.device,
        function.subsystem_vendor,
        function.subsystem_device,
        function.class_code,
    )
    title = " ".join(part for part in (known.vendor, known.device) if part) or "unknown device"
    render.write(
        (function.address, "bold"),
        f"  {escape_line(title)} [{function.vendor}:{function.device}]",
        f" rev {function.revision}",
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
    _facts([*facts, *_passing(shown), *_children(shown)])
    if function.regions:
        render.write(("regions", "bold"))
        for region in function.regions:
            render.write(f"  {_region(region)}")
    _print_capabilities(shown)
    _print_vpd(shown)


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


def _print_capabilities(shown: ShownFunction) -> None:
    config = shown.details.config
    if config is None:
        render.write(("configuration space cannot be read", "yellow"))
        return
    if not config.complete and config.header is not None:
        text = f"capabilities: only {config.size} bytes are readable; the rest needs root"
        render.write((text, "yellow"))
    for problem in config.problems:
        render.write((f"configuration space: {problem}", "yellow"))
    if config.capabilities:
        render.write(("capabilities", "bold"))
    for capability in config.capabilities:
        version = "" if capability.version is None else f" v{capability.version}"
        line = f"  {capability.offset:#05x}  {capability.title}{version}"
        render.write(line, (f"  {summary(capability)}", "dim"))


def _print_vpd(shown: ShownFunction) -> None:
    if shown.vpd is None:
        return
    render.write((f"vital product data  {shown.vpd.name or ''}", "bold"))
    for keyword, value in shown.vpd.fields:
        render.write(f"  {keyword}  {value}")
    for problem in shown.vpd.problems:
        render.write((f"  {problem}", "yellow"))


def print_verdict(verdict: Verdict) -> None:
    """Yes or no, every reason with its evidence, and the commands to type next."""
    answer = ("can be passed through", "bold green")
    if not verdict.passable:
        answer = ("cannot be passed through yet", "bold red")
    render.write((verdict.address, "bold"), " ", answer)
    for blocker in verdict.blockers:
        render.write((f"  {blocker.kind}", "red"), f"  {escape_line(blocker.detail)}")
        render.write((f"      {escape_line(blocker.evidence)}", "dim"))
    for warning in verdict.warnings:
        render.write(("  warning: ", "yellow"), escape_line(warning))
    for note in verdict.notes:
        render.write(f"  note: {escape_line(note)}")
    _print_group(verdict.group)
    if verdict.next:
        render.write(("next", "bold"))
    for command in verdict.next:
        render.write((f"  {escape_line(command)}", "cyan"))


def _print_group(group: IommuGroup | None) -> None:
    if group is None:
        render.write(("in no IOMMU group", "yellow"))
        return
    state = ("viable", "green") if group.viable else ("not viable", "yellow")
    render.write((f"group {group.id}", "bold"), f"  {group.type or '-'}  ", state)
    width = max((len(member.address) for member in group.devices), default=0)
    for member in group.devices:
        what = _ROLES[member.role]
        text = f"  {member.address:<{width}}  {member.driver or '-'} ({what})"
        render.write((escape_line(text), _ROLE_STYLES[member.role]))
    for region in group.reserved_regions:
        render.write((f"  reserved {region.start:#x}-{region.end:#x} {region.type}", "dim"))


def _facts(facts: Iterable[tuple[str, object]]) -> None:
    for name, value in facts:
        if value is not None:
            render.write((f"  {name:<13}", "dim"), escape_line(str(value)))


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
