"""The JSON that commands print while tests run, so that each object is held against its schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vfiotool.cli import output as render
from vfiotool.cli import program
from vfiotool.cli.globals import Globals

Take = Callable[[str, dict[str, Any]], None]

# What describes the object that a command prints.
SCHEMA_OF = {
    "groups": "groups",
    "devices": "devices",
    "show": "show",
    "why": "why",
    "doctor": "doctor",
    "tree": "tree",
    "watch": "watch",
    "snapshot": "snapshot",
    "snapshot diff": "snapshot-diff",
    "bind": "bind",
    "release": "bind",
    "vf list": "vf-list",
    "vf set": "vf-set",
    "mdev types": "mdev-types",
    "mdev list": "mdev-list",
    "mdev create": "mdev-create",
    "mdev remove": "done",
    "vdpa parents": "vdpa-parents",
    "vdpa list": "vdpa-list",
    "vdpa add": "vdpa-changed",
    "vdpa remove": "vdpa-changed",
    "vdpa bind": "vdpa-changed",
    "vdpa set": "vdpa-changed",
    "vdpa stats": "vdpa-stats",
    "plan": "plan",
    "apply": "apply",
    "confirm": "confirm",
    "status": "plan",
    "undo": "undo",
    "history": "history",
    "recover": "recover",
    "export": "export",
    "import": "import",
    "boot enable": "boot-enable",
    "boot disable": "boot-disable",
    "boot status": "boot-status",
    "boot run": "boot-run",
    "vm check": "vm-check",
    "vm run": "vm-run",
    "vm qemu": "vm-arguments",
    "vm libvirt": "vm-libvirt",
    "vm cloud-hypervisor": "vm-arguments",
    "vm kubevirt": "vm-kubevirt",
    "vm proxmox": "vm-proxmox",
    "vm incus": "vm-incus",
    "device info": "device-info",
    "device read": "device-read",
    "device write": "device-read",
    "device reset": "device-reset",
    "device dump": "device-dump",
    "device trace": "device-trace",
    "device frame": "device-frame",
    "device state show": "device-state",
    "device state save": "device-state-saved",
    "device state restore": "device-state-restored",
    "demo": "demo",
    "nvme identify": "nvme-identify",
    "nvme read": "nvme-copied",
    "nvme write": "nvme-copied",
    "nvme bench": "nvme-bench",
    "nvme secondaries": "nvme-secondaries",
    "nvme id-ctrl": "nvme-id-ctrl",
    "nvme id-ns": "nvme-id-ns",
    "nvme list-ns": "nvme-list-ns",
    "nvme smart-log": "nvme-log",
    "nvme error-log": "nvme-error-log",
    "nvme fw-log": "nvme-log",
    "nvme changed-ns-list-log": "nvme-list-ns",
    "nvme effects-log": "nvme-effects-log",
    "nvme sanitize-log": "nvme-log",
    "nvme get-feature": "nvme-feature",
    "nvme report-zones": "nvme-report-zones",
    "nvme set-feature": "nvme-done",
    "nvme format": "nvme-done",
    "nvme sanitize": "nvme-done",
    "nvme create-ns": "nvme-done",
    "nvme delete-ns": "nvme-done",
    "nvme attach-ns": "nvme-done",
    "nvme detach-ns": "nvme-done",
    "nvme fw-download": "nvme-done",
    "nvme compare": "nvme-done",
    "nvme copy": "nvme-done",
    "nvme dsm": "nvme-done",
    "nvme write-zeroes": "nvme-done",
    "nvme verify": "nvme-done",
    "nvme flush": "nvme-done",
    "lab machines": "lab-machines",
    "lab twin": "lab-twin",
    "lab rehearse": "lab-rehearse",
    "lab kernels": "lab-kernels",
    "serve status": "serve-status",
    "vduse list": "vduse-list",
    "vduse resize": "vduse-changed",
    "vduse rescue": "vduse-changed",
}
# These print what is no JSON: a guest's output, a script, help.
WITHOUT = {
    "lab run",
    "lab shell",
    "lab demo",
    "serve vhost-user-blk",
    "serve vfio-user",
    "serve exports",
    "serve limit",
    "serve resize",
    "serve vduse-blk",
    "serve vhost-user",
    "serve vhost-user-net",
    "metrics",
    "completion",
    "help",
    "version",
}


def command_of(arguments: Iterable[str]) -> str:
    """The command in a list of arguments: its words up to the first that is none of its name."""
    words: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("-"):
            skip = argument == "--root"
        else:
            words.append(argument)
    names = (" ".join(words[:count]) for count in (3, 2, 1))
    return next((name for name in names if name in SCHEMA_OF), " ".join(words[:1]))


def schema_of(command: str, payload: Mapping[str, Any]) -> str:
    """The schema of an object that the command printed; a dry run prints a plan's steps."""
    name = SCHEMA_OF[command]
    dry = payload.keys() >= {"steps", "in_sync"} and "transaction" not in payload
    return "plan" if dry else name


def listen(take: Take) -> None:
    """From here on, hand over a copy of each object that a command prints.

    To be called before any command runs.
    """
    emit, run = render.emit, program.run
    current = [""]

    def heard_run(arguments: list[str], chosen: Globals) -> int:
        before, current[0] = current[0], command_of(arguments)
        try:
            return run(arguments, chosen)
        finally:
            current[0] = before

    def heard_emit(payload: Mapping[str, object]) -> None:
        emit(payload)
        if current[0]:
            whole = {"format_version": render.FORMAT_VERSION, **payload}
            take(current[0], json.loads(json.dumps(whole)))

    render.emit, program.run = heard_emit, heard_run
