"""`vfiotool show`: everything about one device."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from vfiotool.cli import output
from vfiotool.cli.context import DeviceArgument, area, examples, host_of, wants_json
from vfiotool.cli.look.roles import print_group
from vfiotool.cli.look.show_capabilities import speed, summary
from vfiotool.devices.pci import BarRegion, Link, PciFunction
from vfiotool.devices.selector import resolve
from vfiotool.devices.show import ShownFunction, ShownMdev, read_shown, shown_as_json
from vfiotool.usage.standing import Standing, Standings

app = area()

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


@app.command(
    "show",
    epilog=examples("vfiotool show 0000:05:01.0", "vfiotool show block:nvme0n1 --json"),
)
def show(context: typer.Context, device: DeviceArgument) -> int:
    """Show everything about one device: driver, slot, regions, capabilities, group."""
    chosen = host_of(context)
    name = resolve(chosen, device)
    shown = read_shown(chosen, name)
    standing = Standings(chosen).named(name)
    if wants_json(context):
        output.emit({**shown_as_json(shown), **standing.as_json()})
    else:
        print_shown(shown, standing)
    return 0


def print_shown(shown: ShownFunction | ShownMdev, standing: Standing) -> None:
    """Everything about one device, in paragraphs."""
    if isinstance(shown, ShownMdev):
        mdev = shown.mdev
        output.write((mdev.uuid, "bold"))
        _facts(
            [
                ("parent", mdev.parent),
                ("type", mdev.type),
                ("driver", shown.driver or "none"),
                ("VFIO node", shown.group_node),
                ("verdict", standing.verdict),
            ],
        )
        print_group(shown.group)
    else:
        _print_function(shown, standing)
        available = standing.verdict == "available"
        print_group(shown.group, shown.function.address if available else None)


def _print_function(shown: ShownFunction, standing: Standing) -> None:
    function = shown.function
    known = shown.names.lookup(
        function.vendor,
        function.device,
        function.subsystem_vendor,
        function.subsystem_device,
        function.class_code,
    )
    title = " ".join(part for part in (known.vendor, known.device) if part) or "unknown device"
    output.write(
        (function.address, "bold"),
        f"  {title} [{_ids(function.vendor, function.device)}]",
        f" rev {function.revision or '??'}",
    )
    subsystem = _ids(function.subsystem_vendor, function.subsystem_device)
    blocked = ", ".join(dict.fromkeys(blocker.kind for blocker in standing.blockers))
    facts = [
        ("verdict", f"{standing.verdict}: {blocked}" if blocked else standing.verdict),
        ("class", f"{known.class_name or 'unknown'} [{function.class_code or '??????'}]"),
        ("subsystem", f"{known.subsystem or ''} [{subsystem}]".strip()),
        ("serial", shown.details.serial),
        ("interfaces", ", ".join(shown.details.interfaces) or None),
        ("disks", ", ".join(shown.details.disks) or None),
        ("driver", function.driver or "none"),
        ("override", function.driver_override),
        ("slot", shown.details.slot),
        ("label", function.label),
        ("NUMA node", function.numa_node),
        ("power", _power(function)),
        ("boot display", "yes" if function.boot_vga else None),
        ("link", None if shown.details.link is None else _link(shown.details.link)),
        ("resets", ", ".join(function.reset_methods) or "none known"),
    ]
    _facts([*facts, *_passing(shown), *_children(shown)])
    if function.regions:
        output.write(("regions", "bold"))
        for region in function.regions:
            output.write(f"  {_region(region)}")
    _print_capabilities(shown)
    _print_vpd(shown)


def _passing(shown: ShownFunction) -> list[tuple[str, object]]:
    function, details = shown.function, shown.details
    nodes = [node for node in (details.group_node, details.device_node) if node is not None]
    return [
        ("IOMMU", function.iommu or ("none" if function.iommu_group is None else "not named")),
        ("VFIO driver", details.vfio_driver or "none found"),
        ("VFIO nodes", ", ".join(nodes) or None),
    ]


def _children(shown: ShownFunction) -> list[tuple[str, object]]:
    function, details, sriov = shown.function, shown.details, shown.function.sriov
    counts = None
    if sriov is not None:
        counts = f"{_number(sriov.num_vfs)} of {sriov.total_vfs} VFs"
    if counts is not None and details.vfs:
        counts += f": {', '.join(details.vfs)}"
    physfn = None
    if function.physfn is not None:
        physfn = f"VF {_number(function.vf_index)} of {function.physfn}"
    types = ", ".join(
        f"{item.type} ({_number(item.available_instances)})" for item in shown.mdev_types
    )
    return [
        ("SR-IOV", counts or physfn),
        ("mdev types", types or None),
        ("mdevs", ", ".join(details.mdevs) or None),
        ("vDPA", ", ".join(details.vdpas) or None),
    ]


def _print_capabilities(shown: ShownFunction) -> None:
    config = shown.details.config
    if config is None:
        output.write(("configuration space cannot be read", "yellow"))
        return
    if not config.complete and config.header is not None:
        text = f"capabilities: only {config.size} bytes are readable; the rest needs root"
        output.write((text, "yellow"))
    for problem in config.problems:
        output.write((f"configuration space: {problem}", "yellow"))
    if config.capabilities:
        output.write(("capabilities", "bold"))
    for capability in config.capabilities:
        version = "" if capability.version is None else f" v{capability.version}"
        line = f"  {capability.offset:#05x}  {capability.title}{version}"
        output.write(line, (f"  {summary(capability)}", "dim"))


def _print_vpd(shown: ShownFunction) -> None:
    if shown.vpd is None:
        return
    output.write((f"vital product data  {shown.vpd.name or ''}", "bold"))
    for keyword, value in shown.vpd.fields:
        output.write(f"  {keyword}  {value}")
    if shown.vpd.checksum_ok is False:
        output.write(("  checksum wrong", "yellow"))
    for problem in shown.vpd.problems:
        output.write((f"  {problem}", "yellow"))


def _facts(facts: Iterable[tuple[str, object]]) -> None:
    for name, value in facts:
        if value is not None:
            output.write((f"  {name:<13}", "dim"), str(value))


def _power(function: PciFunction) -> str | None:
    if function.power_state is None:
        return None
    cold = {True: ", D3cold allowed", False: ", D3cold not allowed", None: ""}
    return function.power_state + cold[function.d3cold_allowed]


def _ids(vendor: str | None, device: str | None) -> str:
    return f"{vendor or '????'}:{device or '????'}"


def _link(link: Link) -> str:
    now, best = speed(link.speed_gts, link.width), speed(link.max_speed_gts, link.max_width)
    return now if now == best else f"{now}, at best {best}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


def _region(region: BarRegion) -> str:
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
