"""`nvme id-ctrl`, logs, features, namespaces, format, firmware: in nvme-cli's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive.nvme_opening import (
    NamespaceOption,
    OverwriteOption,
    controlled,
    refuse_loss,
    show_done,
    show_fields,
)
from vfiotool.cli.drive.opening import BackendOption, seekable

app = area()
FeatureOption = Annotated[
    int, typer.Option("--feature-id", "-f", metavar="N", help="Its number: 6 is the write cache.")
]


def _log(
    context: typer.Context, device: str, backend: str, page: int, size: int = 4096
) -> tuple[str, bytes]:
    """The device's name and a log page of the whole controller."""
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        return controller.device.name, admin.log_page(controller, page, size)


def _list_namespaces(context: typer.Context, name: str, found: Sequence[int]) -> None:
    if wants_json(context):
        output.emit({"device": name, "nsid_list": found})
        return
    for nsid in found:
        output.write(str(nsid))


@app.command("id-ctrl", epilog=examples("vfiotool nvme id-ctrl 0000:05:01.0"))
def id_ctrl(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """Show Identify Controller in full."""
    from vfiotool.drivers.nvme import tables

    with controlled(context, device, backend) as controller:
        show_fields(context, controller.device.name, tables.id_ctrl(controller.identity.raw))


@app.command("id-ns", epilog=examples("vfiotool nvme id-ns 0000:05:01.0 --nsid 1"))
def id_ns(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Show Identify Namespace in full, with formats and identifiers."""
    from vfiotool.drivers.nvme import spec, tables

    with controlled(context, device, backend) as controller:
        controller.namespace(nsid)
        fields = tables.id_ns(controller.identify(spec.CNS_NAMESPACE, nsid))
        described = tables.ns_descriptors(controller.identify(spec.CNS_DESCRIPTORS, nsid))
        fields["descriptors"] = described
        show_fields(context, controller.device.name, {"nsid": nsid, **fields})


@app.command("list-ns", epilog=examples("vfiotool nvme list-ns 0000:05:01.0 --all"))
def list_ns(
    context: typer.Context,
    device: DeviceArgument,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Those that are not attached, too.")
    ] = False,
    backend: BackendOption = "auto",
) -> None:
    """List the identifiers of the namespaces."""
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        found = admin.allocated_namespaces(controller) if every else controller.namespaces()
        name = controller.device.name
    _list_namespaces(context, name, found)


@app.command("smart-log", epilog=examples("vfiotool nvme smart-log 0000:05:01.0"))
def smart_log(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """Show the SMART / health log; temperatures in kelvin."""
    from vfiotool.drivers.nvme import admin, tables

    name, raw = _log(context, device, backend, admin.Log.SMART, 512)
    show_fields(context, name, tables.smart_log(raw))


@app.command("error-log", epilog=examples("vfiotool nvme error-log 0000:05:01.0"))
def error_log(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """Show the error log's entries, newest first."""
    from vfiotool.drivers.nvme import admin, tables

    with controlled(context, device, backend) as controller:
        size = 64 * (controller.identity.raw[262] + 1)
        entries = tables.error_log(admin.log_page(controller, admin.Log.ERROR, size))
        name = controller.device.name
    if wants_json(context):
        output.emit({"device": name, "errors": entries})
        return
    columns = ("error_count", "sqid", "cmdid", "status_field", "lba", "nsid")
    rows = [[str(entry[column]) for column in columns] for entry in entries]
    output.table(("COUNT", "QUEUE", "COMMAND", "STATUS", "LBA", "NAMESPACE"), rows)


@app.command("fw-log", epilog=examples("vfiotool nvme fw-log 0000:05:01.0"))
def fw_log(context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto") -> None:
    """Show the firmware slots."""
    from vfiotool.drivers.nvme import admin, tables

    name, raw = _log(context, device, backend, admin.Log.FIRMWARE, 512)
    show_fields(context, name, tables.fw_log(raw))


@app.command(
    "changed-ns-list-log", epilog=examples("vfiotool nvme changed-ns-list-log 0000:05:01.0")
)
def changed_ns_list_log(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """List the namespaces that changed since this was last read."""
    from vfiotool.drivers.nvme import admin, tables

    name, raw = _log(context, device, backend, admin.Log.CHANGED_NAMESPACES)
    _list_namespaces(context, name, tables.changed_namespaces(raw))


@app.command("effects-log", epilog=examples("vfiotool nvme effects-log 0000:05:01.0"))
def effects_log(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """Show the commands that the controller supports, and their effects."""
    from vfiotool.drivers.nvme import admin, tables

    name, raw = _log(context, device, backend, admin.Log.EFFECTS)
    found = tables.effects_log(raw)
    if wants_json(context):
        output.emit({"device": name, **found})
        return
    rows = [
        [kind, opcode, f"{effects:#010x}"]
        for kind, opcodes in found.items()
        for opcode, effects in opcodes.items()
    ]
    output.table(("KIND", "OPCODE", "EFFECTS"), rows)


@app.command("sanitize-log", epilog=examples("vfiotool nvme sanitize-log 0000:05:01.0"))
def sanitize_log(
    context: typer.Context, device: DeviceArgument, backend: BackendOption = "auto"
) -> None:
    """Show how far a sanitize is."""
    from vfiotool.drivers.nvme import admin, tables

    name, raw = _log(context, device, backend, admin.Log.SANITIZE, 512)
    show_fields(context, name, tables.decode(tables.SANITIZE, raw))


@app.command("get-feature", epilog=examples("vfiotool nvme get-feature 0000:05:01.0 -f 6"))
def get_feature(
    context: typer.Context,
    device: DeviceArgument,
    feature: FeatureOption,
    select: Annotated[
        int, typer.Option("--sel", "-s", metavar="0-3", help="0 current, 1 default, 2 saved.")
    ] = 0,
    nsid: Annotated[int, typer.Option("--nsid", metavar="N", help="The namespace.")] = 0,
    backend: BackendOption = "auto",
) -> None:
    """Show a feature's value."""
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        value, _ = admin.get_feature(controller, feature, nsid=nsid, select=select)
        name = controller.device.name
    if wants_json(context):
        output.emit({"device": name, "feature": feature, "value": value})
    else:
        output.write(f"feature {feature:#04x}: {value:#010x}")


@app.command(
    "set-feature", epilog=examples("vfiotool nvme set-feature 0000:05:01.0 -f 6 --value 0")
)
def set_feature(
    context: typer.Context,
    device: DeviceArgument,
    feature: FeatureOption,
    value: Annotated[int, typer.Option("--value", "-V", metavar="N", help="Dword 11.")],
    save: Annotated[bool, typer.Option("--save", help="Keep it over power cycles.")] = False,
    nsid: Annotated[int, typer.Option("--nsid", metavar="N", help="The namespace.")] = 0,
    backend: BackendOption = "auto",
) -> None:
    """Set a feature: until the controller is reset, or for good with --save."""
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        admin.set_feature(controller, feature, value, nsid=nsid, save=save)
        show_done(context, controller.device.name, f"feature {feature:#04x} set to {value:#x}")


@app.command(
    "format", epilog=examples("vfiotool nvme format 0000:05:01.0 --nsid 1 --lbaf 0 --overwrite")
)
def format_namespace(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption = 1,
    lbaf: Annotated[
        int | None,
        typer.Option("--lbaf", metavar="N", help="The format; default: the one in use."),
    ] = None,
    ses: Annotated[
        int, typer.Option("--ses", metavar="0-2", help="1 erases data, 2 cryptographically.")
    ] = 0,
    protection: Annotated[
        int, typer.Option("--pi", metavar="0-3", help="Type of protection information.")
    ] = 0,
    extended: Annotated[
        bool, typer.Option("--ms", help="Metadata behind each block's data.")
    ] = False,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Format a namespace. Its data is lost."""
    from vfiotool.drivers.nvme import admin

    refuse_loss(f"formatting namespace {nsid}", device, overwrite)
    with controlled(context, device, backend) as controller:
        admin.format_namespace(
            controller, nsid, lbaf=lbaf, erase=ses, protection=protection, extended=extended
        )
        show_done(context, controller.device.name, f"namespace {nsid} formatted", nsid=nsid)


@app.command("sanitize", epilog=examples("vfiotool nvme sanitize 05:01.0 --sanact 2 --overwrite"))
def sanitize(
    context: typer.Context,
    device: DeviceArgument,
    action: Annotated[
        int,
        typer.Option("--sanact", metavar="1-5", help="2 erases blocks, 3 overwrites, 4 the key."),
    ],
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Begin to sanitize the whole disk: all its data is lost. See sanitize-log."""
    from vfiotool.drivers.nvme import admin

    refuse_loss("sanitizing", device, overwrite)
    with controlled(context, device, backend) as controller:
        admin.sanitize(controller, action)
        show_done(context, controller.device.name, "sanitize has begun")


@app.command("create-ns", epilog=examples("vfiotool nvme create-ns 0000:05:01.0 --nsze 131072"))
def create_ns(
    context: typer.Context,
    device: DeviceArgument,
    nsze: Annotated[int, typer.Option("--nsze", metavar="BLOCKS", help="Its size.")],
    lbaf: Annotated[int, typer.Option("--lbaf", metavar="N", help="The format.")] = 0,
    backend: BackendOption = "auto",
) -> None:
    """Create a namespace; attach-ns makes it usable."""
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        nsid = admin.create_namespace(controller, nsze, lbaf=lbaf)
        show_done(context, controller.device.name, f"namespace {nsid} created", nsid=nsid)


@app.command(
    "delete-ns", epilog=examples("vfiotool nvme delete-ns 0000:05:01.0 --nsid 2 --overwrite")
)
def delete_ns(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Delete a namespace. Its data is lost."""
    from vfiotool.drivers.nvme import admin

    refuse_loss(f"deleting namespace {nsid}", device, overwrite)
    with controlled(context, device, backend) as controller:
        admin.delete_namespace(controller, nsid)
        show_done(context, controller.device.name, f"namespace {nsid} deleted", nsid=nsid)


def _attach(context: typer.Context, device: str, nsid: int, backend: str, detach: bool) -> None:
    from vfiotool.drivers.nvme import admin

    with controlled(context, device, backend) as controller:
        admin.attach(controller, nsid, detach=detach)
        verb = "detached" if detach else "attached"
        show_done(context, controller.device.name, f"namespace {nsid} {verb}", nsid=nsid)


@app.command("attach-ns", epilog=examples("vfiotool nvme attach-ns 0000:05:01.0 --nsid 2"))
def attach_ns(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption,
    backend: BackendOption = "auto",
) -> None:
    """Attach a namespace to this controller."""
    _attach(context, device, nsid, backend, detach=False)


@app.command("detach-ns", epilog=examples("vfiotool nvme detach-ns 0000:05:01.0 --nsid 2"))
def detach_ns(
    context: typer.Context,
    device: DeviceArgument,
    nsid: NamespaceOption,
    backend: BackendOption = "auto",
) -> None:
    """Detach a namespace from this controller; its data stays."""
    _attach(context, device, nsid, backend, detach=True)


@app.command("fw-download", epilog=examples("vfiotool nvme fw-download 05:01.0 --fw image.bin"))
def fw_download(
    context: typer.Context,
    device: DeviceArgument,
    image: Annotated[
        str,
        typer.Option("--fw", metavar="FILE", help="The image.", autocompletion=candidates.files),
    ],
    slot: Annotated[int, typer.Option("--slot", metavar="0-7", help="For the commit.")] = 0,
    action: Annotated[
        int, typer.Option("--action", metavar="0-3", help="Commit: 0 stores, 1 and 3 activate.")
    ] = 0,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "auto",
) -> None:
    """Hand a firmware image over and commit it to a slot, in one go: what was handed over is
    forgotten when the controller is shut down."""
    from vfiotool.drivers.nvme import admin

    refuse_loss("replacing a firmware slot", device, overwrite)
    with seekable(image) as file, controlled(context, device, backend) as controller:
        admin.firmware_download(controller, file.read())
        admin.firmware_commit(controller, slot, action)
        show_done(context, controller.device.name, f"firmware committed to slot {slot}")
