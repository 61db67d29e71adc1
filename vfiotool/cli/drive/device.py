"""`device info|read|write|reset|dump`: a VFIO device on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive import device_frame, device_state, device_trace
from vfiotool.cli.drive.opening import (
    REGION_NAMES,
    BackendOption,
    OffsetArgument,
    RegionArgument,
    TokenOption,
    TraceOption,
    WidthOption,
    driver_and_device,
    number,
    opened,
    region_number,
)
from vfiotool.errors import UsageError

if TYPE_CHECKING:
    from vfiotool.vfio import Device

_WIDTHS = (1, 2, 4, 8)

app = area("Read, write and reset a VFIO device from user space.")
app.add_typer(device_state.app, name="state")
device_trace.add_to(app)
device_frame.add_to(app)


@app.command(
    "info",
    epilog=examples("vfiotool device info 0000:05:01.0", "vfiotool device info block:nvme0n1"),
)
def info(
    context: typer.Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
) -> None:
    """Show the regions, interrupts and features that the kernel offers for a device."""
    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        found = _describe(opened_device)
    if wants_json(context):
        output.emit(found)
        return
    output.write(f"{found['device']}  {', '.join(found['kinds'])}  through {found['backend']}")
    called = {n: name for name, n in REGION_NAMES.items()} if "pci" in found["kinds"] else {}
    for region in found["regions"]:
        areas = ", ".join(f"{area['offset']:#x}+{area['size']:#x}" for area in region["mmap"])
        flags = " ".join(region["flags"]) + (f"  mappable {areas}" if areas else "")
        name = called.get(region["index"], f"region {region['index']}")
        output.write(f"  {name:<9}  {region['size']:#12x} bytes  {flags}")
    for irq in found["irqs"]:
        output.write(f"  {irq['name']:<9}  {irq['count']:>12} irqs   {' '.join(irq['flags'])}")
    output.write(f"  reset      {'yes' if found['reset'] else 'no'}")
    offered = [name for name, offers in found["features"].items() if offers]
    output.write(f"  features   {', '.join(offered) or 'none'}")


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


@app.command(
    "read",
    epilog=examples(
        "vfiotool device read 0000:05:01.0 bar0 0x0",
        "vfiotool device read 0000:05:01.0 config 0 --width 2 --count 8",
    ),
)
def read(
    context: typer.Context,
    device: DeviceArgument,
    region: RegionArgument,
    offset: OffsetArgument,
    width: WidthOption = 4,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Registers in a row.")] = 1,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
) -> None:
    """Read registers of a region, each in one access of exactly --width bytes."""
    index, start = region_number(region), number(offset, "an offset")
    if width not in _WIDTHS or count < 1:
        raise UsageError("--width is 1, 2, 4 or 8, --count at least 1")
    with opened(context, device, backend, trace, vf_token) as opened_device:
        source = opened_device.region(index)
        values = [source.read(start + width * i, width) for i in range(count)]
        name = opened_device.name
    if wants_json(context):
        output.emit(
            {"device": name, "region": index, "offset": start, "width": width, "values": values}
        )
        return
    row = max(1, 16 // width)
    for i in range(0, count, row):
        shown = " ".join(f"{value:0{2 * width}x}" for value in values[i : i + row])
        output.write(f"{start + width * i:08x}  {shown}")


@app.command("write", epilog=examples("vfiotool device write 0000:05:01.0 bar0 0x4 0x1f"))
def write(
    context: typer.Context,
    device: DeviceArgument,
    region: RegionArgument,
    offset: OffsetArgument,
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="What to write: decimal, or hexadecimal with 0x.")
    ],
    width: WidthOption = 4,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
) -> None:
    """Write one register of a region, in one access of exactly --width bytes."""
    index, start = region_number(region), number(offset, "an offset")
    stored = number(value, "a value")
    if width not in _WIDTHS:
        raise UsageError("--width is 1, 2, 4 or 8")
    with opened(context, device, backend, trace, vf_token) as opened_device:
        opened_device.region(index).write(start, stored, width)
        name = opened_device.name
    if wants_json(context):
        output.emit(
            {"device": name, "region": index, "offset": start, "width": width, "values": [stored]}
        )


@app.command(
    "reset",
    epilog=examples(
        "vfiotool device reset 0000:05:01.0", "vfiotool device reset 0000:05:01.0 --hot"
    ),
)
def reset(
    context: typer.Context,
    device: DeviceArgument,
    hot: Annotated[
        bool, typer.Option("--hot", help="Reset the whole slot or bus, if all on it is ours.")
    ] = False,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
) -> None:
    """Reset a device: by itself, or with --hot together with all on its slot or bus."""
    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        name = opened_device.name
        if hot:
            also = [entry.address for entry in opened_device.hot_reset()]
        else:
            opened_device.reset()
            also = [name]
    if wants_json(context):
        output.emit({"device": name, "reset": also, "hot": hot})
    else:
        output.say(f"reset: {', '.join(also)}")


@app.command(
    "dump",
    epilog=examples("vfiotool device dump 0000:05:01.0", "vfiotool device dump edu 0000:05:01.0"),
)
def dump(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[DRIVER] DEVICE",
            help="Whose registers (left out: those of the driver that drives it), and the device. "
            f"{SELECTORS}",
            autocompletion=candidates.demos_and_devices,
        ),
    ],
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
) -> None:
    """Print a device's registers, decoded as its driver declares them."""
    from vfiotool.drivers import driver_of, register_map

    driver, device = driver_and_device(words)
    with opened(context, device, backend, vf_token=vf_token) as opened_device:
        driver = driver or driver_of(opened_device)
        found = list(register_map(driver, opened_device).dump())
        name = opened_device.name
    if wants_json(context):
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
        output.emit({"device": name, "driver": driver, "registers": registers})
        return
    for register, value, fields in found:
        decoded = "  ".join(f"{key}={bits:#x}" for key, bits in fields.items())
        shown = f"{value:0{2 * register.width}x}"
        output.write(f"{register.offset:06x}  {register.name:<24} {shown:>16}  {decoded}".rstrip())
