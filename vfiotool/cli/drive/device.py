"""`device info|read|write|reset|dump|trace` and `demo`: a VFIO device on the command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.cli.drive.device_frame import register_frame
from vfiotool.cli.drive.device_state import register_state
from vfiotool.cli.output import emit, host, say, state, uuid_of
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.vfio import Device

_WIDTHS = (1, 2, 4, 8)
# Of a trace's numbers those that people count.
_COUNTED = ("width", "vector", "count", "length")
# The PCI regions by the names that people use for them; lspci's "Region n" is BAR n.
_REGION_NAMES = {**{f"bar{n}": n for n in range(6)}, "rom": 6, "config": 7, "vga": 8}

BackendOption = Annotated[
    str,
    Option("--backend", metavar="NAME", help="auto, iommufd, type1; noiommu only when asked for."),
]
TraceOption = Annotated[
    str | None,
    Option("--trace", metavar="FILE", help="Record every access there, as JSON lines."),
]
TokenOption = Annotated[
    str | None,
    Option("--vf-token", metavar="UUID", help="For a VF whose PF is driven from user space."),
]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON object.")]
DeviceArgument = Annotated[str, Argument(metavar="DEVICE", help="PCI address or mdev UUID.")]
RegionArgument = Annotated[
    str, Argument(metavar="REGION", help="A number, or bar0 … bar5, rom, config.")
]
WidthOption = Annotated[int, Option("--width", metavar="1|2|4|8", help="Bytes an access.")]


def register(app: Commands) -> None:
    """Add the commands of this area."""
    group = Commands(help="Drive a VFIO device from user space.")
    group.command("info", short_help="Show the regions and interrupts of a device.")(info)
    group.command("read", short_help="Read registers, each in one access.")(read)
    group.command(
        "write",
        short_help="Write one register in one access.",
        context_settings={"ignore_unknown_options": True},
    )(write)
    group.command("reset", short_help="Reset a device, or all that share its reset.")(reset)
    group.command("dump")(dump)
    group.command("trace")(trace_command)
    register_frame(group)
    register_state(group)
    app.add_typer(group, name="device")
    app.command("demo", short_help="Run a driver on a device and print each check.")(demo)


@contextmanager
def opened(
    context: Context,
    name: str,
    backend: str,
    trace: str | None = None,
    vf_token: str | None = None,
) -> Iterator[Device]:
    """The device, opened for the time of the block, with its trace if one is wanted."""
    from vfiotool.vfio import Device, Trace

    with ExitStack() as stack:
        record = None
        if trace is not None:
            try:
                output = sys.stderr if trace == "-" else open(trace, "w")  # noqa: SIM115
            except OSError as error:
                raise UsageError(f"{trace} cannot be written: {error.strerror}") from error
            if output is not sys.stderr:
                stack.enter_context(output)
            record = Trace(output)
        yield stack.enter_context(
            Device.open(
                name,
                backend=backend,
                host=host(context),
                trace=record,
                vf_token=None if vf_token is None else uuid_of("--vf-token", vf_token),
            )
        )


def region_number(text: str) -> int:
    """A region by number or by name. Raises UsageError."""
    if text.lower() in _REGION_NAMES:
        return _REGION_NAMES[text.lower()]
    if not text.isdecimal() and not text.lower().startswith("0x"):
        names = ", ".join(_REGION_NAMES)
        raise UsageError(f"{text[:80]!r} is no region", hint=f"one of {names}, or a number")
    return number(text, "a region")


def number(text: str, what: str) -> int:
    """A number in decimal, or with 0x in hexadecimal. Raises UsageError."""
    try:
        value = int(text, 0)
    except ValueError:
        raise UsageError(
            f"{text[:80]!r} is not {what}: give a number, 0x for hexadecimal"
        ) from None
    if value < 0:
        raise UsageError(f"{text[:80]!r} is not {what}: it is negative")
    return value


def _wants_json(context: Context, as_json: bool) -> bool:
    return as_json or state(context).json


def info(
    context: Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the regions, interrupts and features that the kernel offers for a device."""
    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        found = _describe(opened_device)
    if _wants_json(context, as_json):
        emit(found)
        return
    print(f"{found['device']}  {', '.join(found['kinds'])}  through {found['backend']}")
    called = {n: name for name, n in _REGION_NAMES.items()} if "pci" in found["kinds"] else {}
    for region in found["regions"]:
        areas = ", ".join(f"{area['offset']:#x}+{area['size']:#x}" for area in region["mmap"])
        flags = " ".join(region["flags"]) + (f"  mappable {areas}" if areas else "")
        name = called.get(region["index"], f"region {region['index']}")
        print(f"  {name:<9}  {region['size']:#12x} bytes  {flags}")
    for irq in found["irqs"]:
        print(f"  {irq['name']:<9}  {irq['count']:>12} irqs   {' '.join(irq['flags'])}")
    print(f"  reset      {'yes' if found['reset'] else 'no'}")
    offered = [name for name, offers in found["features"].items() if offers]
    print(f"  features   {', '.join(offered) or 'none'}")


def _describe(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "backend": device.backend,
        "kinds": list(device.info.kinds),
        "regions": [
            {
                "index": region.index,
                "size": region.size,
                "flags": list(region.flags),
                "mmap": [{"offset": area.offset, "size": area.size} for area in region.areas],
                "type": region.type,
                "subtype": region.subtype,
                "msix_mappable": region.msix_mappable,
            }
            for region in device.regions
            if region is not None and region.size
        ],
        "irqs": [
            {
                "index": irq.index,
                "name": device.irqs.name(irq.index),
                "count": irq.count,
                "flags": list(irq.flags),
            }
            for irq in device.irqs.infos
            if irq is not None and irq.count
        ],
        "reset": device.info.has_reset,
        "features": device.features(),
    }


def read(
    context: Context,
    device: DeviceArgument,
    region: RegionArgument,
    offset: Annotated[str, Argument(metavar="OFFSET")],
    width: WidthOption = 4,
    count: Annotated[int, Option("--count", metavar="N", help="Registers in a row.")] = 1,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read registers of a region, each in one access of exactly --width bytes."""
    index, start = region_number(region), number(offset, "an offset")
    if width not in _WIDTHS or count < 1:
        raise UsageError("--width is 1, 2, 4 or 8, --count at least 1")
    with opened(context, device, backend, trace, vf_token) as opened_device:
        source = opened_device.region(index)
        values = [source.read(start + width * i, width) for i in range(count)]
        name = opened_device.name
    if _wants_json(context, as_json):
        emit({"device": name, "region": index, "offset": start, "width": width, "values": values})
        return
    row = max(1, 16 // width)
    for i in range(0, count, row):
        shown = " ".join(f"{value:0{2 * width}x}" for value in values[i : i + row])
        print(f"{start + width * i:08x}  {shown}")


def write(
    context: Context,
    device: DeviceArgument,
    region: RegionArgument,
    offset: Annotated[str, Argument(metavar="OFFSET")],
    value: Annotated[str, Argument(metavar="VALUE")],
    width: WidthOption = 4,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one register of a region, in one access of exactly --width bytes."""
    index, start = region_number(region), number(offset, "an offset")
    stored = number(value, "a value")
    if width not in _WIDTHS:
        raise UsageError("--width is 1, 2, 4 or 8")
    with opened(context, device, backend, trace, vf_token) as opened_device:
        opened_device.region(index).write(start, stored, width)
        name = opened_device.name
    if _wants_json(context, as_json):
        emit({"device": name, "region": index, "offset": start, "width": width, "values": [stored]})


def reset(
    context: Context,
    device: DeviceArgument,
    hot: Annotated[
        bool, Option("--hot", help="Reset the whole slot or bus, if all on it is ours.")
    ] = False,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reset a device: by itself, or with --hot together with all on its slot or bus."""
    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        name = opened_device.name
        if hot:
            also = [entry.address for entry in opened_device.hot_reset()]
        else:
            opened_device.reset()
            also = [name]
    if _wants_json(context, as_json):
        emit({"device": name, "reset": also, "hot": hot})
    else:
        say(f"reset: {', '.join(also)}")


def dump(
    context: Context,
    driver: Annotated[str, Argument(metavar="DRIVER", help="Whose registers: edu, …")],
    device: DeviceArgument,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a device's registers, decoded as its driver declares them."""
    from vfiotool.drivers import register_map

    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        found = list(register_map(driver, opened_device).dump())
        name = opened_device.name
    if _wants_json(context, as_json):
        registers = [
            {
                "name": register.name,
                "offset": register.offset,
                "width": register.width,
                "value": value,
                "fields": fields,
            }
            for register, value, fields in found
        ]
        emit({"device": name, "driver": driver, "registers": registers})
        return
    for register, value, fields in found:
        decoded = "  ".join(f"{key}={bits:#x}" for key, bits in fields.items())
        shown = f"{value:0{2 * register.width}x}"
        print(f"{register.offset:06x}  {register.name:<24} {shown:>16}  {decoded}".rstrip())


def trace_command(
    context: Context,
    file: Annotated[str, Argument(metavar="FILE", help="Made with --trace; - for stdin.")],
    compare: Annotated[
        str | None, Option("--compare", metavar="FILE", help="Tell where FILE differs.")
    ] = None,
    replay: Annotated[
        str | None, Option("--replay", metavar="DEVICE", help="Do it again on a device.")
    ] = None,
    follow: Annotated[
        bool, Option("--follow", "-f", help="Go on showing what is appended.")
    ] = False,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Show a recorded trace, live with -f; compare two; replay one. 1 if they differ."""
    from vfiotool.vfio.replay import Replay
    from vfiotool.vfio.trace import differences, load

    if compare is None and replay is None:
        with _lines(file, follow) as lines:
            for event in load(lines):
                print(json.dumps(event) if _wants_json(context, as_json) else _shown(event))
        return 0
    with _lines(file, False) as lines:
        events = list(load(lines))
    if compare is not None:
        with _lines(compare, False) as lines:
            found = differences(events, load(lines))
    else:
        with opened(context, replay or "", backend) as device:
            found = Replay(device).run(events)
    if _wants_json(context, as_json):
        emit({"events": len(events), "differences": found})
    else:
        print("\n".join(found) if found else f"{len(events)} events, no difference")
    return 1 if found else 0


@contextmanager
def _lines(file: str, follow: bool) -> Iterator[Iterator[str]]:
    """The lines of a file; with `follow` those too that are still to come, until Ctrl-C."""
    if file == "-":
        yield iter(sys.stdin)
        return
    try:
        source = open(file)  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    with source:
        yield _following(source) if follow else iter(source)


def _following(source: TextIO) -> Iterator[str]:
    held = ""
    while True:
        held += source.readline()
        if held.endswith("\n"):
            yield held
            held = ""
        else:
            sys.stdout.flush()
            time.sleep(0.1)


def _shown(event: dict[str, object]) -> str:
    """An event on one line: time, what, where, and the rest by name; what is counted in decimal,
    what is made of bits or addresses in hexadecimal."""
    from vfiotool.devices.pci import Address
    from vfiotool.vfio.irq import NAMES

    is_pci = Address.is_address(str(event.get("device")))
    places = {"region": {n: name for name, n in _REGION_NAMES.items()}, "index": NAMES}
    parts = []
    for key, value in event.items():
        if key in ("t", "device", "event") or (key == "offset" and "region" in event):
            continue
        if key in places and isinstance(value, int):
            name = places[key].get(value) if is_pci else None
            offset = event.get("offset")
            inside = f"+{offset:#x}" if isinstance(offset, int) else ""
            parts.append((name or f"{key} {value}") + inside)
        elif key in _COUNTED or isinstance(value, bool) or not isinstance(value, int):
            parts.append(f"{key}={value}")
        else:
            parts.append(f"{key}={value:#x}")
    when = event.get("t")
    stamp = f"{when:12.6f}" if isinstance(when, int | float) else " " * 12
    return f"{stamp}  {event.get('event')!s:<9} {'  '.join(parts)}".rstrip()


def demo(
    context: Context,
    name: Annotated[str, Argument(metavar="NAME", help="edu, mbochs, mdpy, mtty, nvme, …")],
    device: DeviceArgument,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> int:
    """Run a driver of vfiotool's on a device and print each check; fails when one fails."""
    from vfiotool.drivers import demo as find_demo

    run = find_demo(name)
    checks = []
    with opened(context, device, backend, trace, vf_token) as opened_device:
        for check in run(opened_device):
            checks.append(check)
            if not _wants_json(context, as_json):
                print(
                    f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}", flush=True
                )
        used, shown = opened_device.backend, opened_device.name
    passed = bool(checks) and all(check.passed for check in checks)
    if _wants_json(context, as_json):
        emit(
            {
                "demo": name,
                "device": shown,
                "backend": used,
                "passed": passed,
                "checks": [
                    {"name": check.name, "passed": check.passed, "detail": check.detail}
                    for check in checks
                ],
            }
        )
    return 0 if passed else 5
