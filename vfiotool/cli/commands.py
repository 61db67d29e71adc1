"""The table of commands: name, where it lives, where help lists it, and one line of help.

Importing this imports nothing else. A command is a row here and a function in the module that the
row names; help and completion of the whole program need no more than the table.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# In the order in which help lists them.
SECTIONS = ("Look", "Change", "Policy", "Virtual machines", "Drive", "Serve", "Lab", "Tools")

# name: (module below vfiotool.cli, section, help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "groups": ("look.groups", "Look", "List IOMMU groups and who is in them."),
    "devices": ("look.devices", "Look", "List PCI devices with their drivers."),
    "show": ("look.show", "Look", "Show everything about one device."),
    "why": ("look.why", "Look", "Explain whether a device can be passed through."),
    "doctor": ("look.doctor", "Look", "Examine the host: IOMMU, modules, conflicts."),
    "tree": ("look.tree", "Look", "Show the PCI tree: groups, drivers, VFs, mdevs."),
    "watch": ("look.watch", "Look", "Print device events as they happen."),
    "snapshot": ("look.snapshot", "Look", "Save this host in a file, or compare two."),
    "bind": ("change.bind", "Change", "Detach devices from the host, for VFIO passthrough."),
    "release": ("change.bind", "Change", "Give devices back to their host driver (unbind)."),
    "vf": ("change.vf", "Change", "List and create SR-IOV virtual functions."),
    "mdev": ("change.mdev", "Change", "List and create mediated devices (vGPU)."),
    "vdpa": ("change.vdpa", "Change", "List and create vDPA devices."),
    "plan": ("change.policy", "Policy", "Show what a policy would change."),
    "apply": ("change.policy", "Policy", "Apply a policy; all or nothing."),
    "confirm": ("change.policy", "Policy", "Keep what apply --confirm-within changed."),
    "status": ("change.policy", "Policy", "Check whether the host matches a policy."),
    "undo": ("change.history", "Policy", "Revert the last change."),
    "history": ("change.history", "Policy", "List the changes since the last boot."),
    "recover": ("change.history", "Policy", "Finish or roll back an interrupted change."),
    "export": ("change.policy", "Policy", "Print the present state as a policy."),
    "import": ("change.imports", "Policy", "Turn another tool's settings into a policy."),
    "boot": ("change.boot", "Policy", "Apply a policy at every boot."),
    "vm": ("vm", "Virtual machines", "Print hostdev elements or options for a VM."),
    "device": ("drive.device", "Drive", "Read, write and reset a VFIO device."),
    "demo": ("drive.demo", "Drive", "Run a driver on a device and check it."),
    "nvme": ("drive.nvme", "Drive", "Use an NVMe disk from user space."),
    "serve": ("serve", "Serve", "Serve virtio disks to VMs over vhost-user."),
    "vduse": ("vduse", "Serve", "List, resize and rescue VDUSE devices."),
    "lab": ("lab", "Lab", "Rehearse in QEMU guests with a virtual IOMMU."),
    "metrics": ("metrics", "Tools", "Print devices and servers for Prometheus."),
    "completion": ("tools", "Tools", "Print the completion script of a shell."),
    "help": ("tools", "Tools", "Show the help of a command."),
    "version": ("tools", "Tools", "Print the version."),
}

# Words of other tools, and what they are called here.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "unbind": ("release",),
    # What this means depends on where one comes from: virsh nodedev-detach is `bind`.
    "detach": ("release", "bind"),
    "reattach": ("release",),
    "restore": ("release",),
    "attach": ("bind", "vm"),
    "list": ("devices",),
    "ls": ("devices",),
    "lspci": ("devices",),
    "info": ("show",),
    "explain": ("why",),
    "check": ("doctor", "vm"),
    "diff": ("plan", "snapshot"),
    "rollback": ("undo",),
    "revert": ("undo",),
    "log": ("history",),
    "persist": ("boot",),
    "hostdev": ("vm",),
    "passthrough": ("bind", "why"),
    "sriov": ("vf",),
    "vgpu": ("mdev",),
}


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each section that has commands, with their names and help."""
    for section in SECTIONS:
        rows = [(name, row[2]) for name, row in COMMANDS.items() if row[1] == section]
        if rows:
            yield section, rows
