"""Every reading command on a host or fixture, run in this process with --json."""

from __future__ import annotations

import contextlib
import io

from vfiotool.cli.main import main
from vfiotool.devices.mdev import read_mdevs
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host

PLAIN = {
    "groups": ["groups"],
    "devices": ["devices"],
    "doctor": ["doctor"],
    "tree": ["tree"],
    "vf-list": ["vf", "list"],
    "mdev-types": ["mdev", "types"],
    "mdev-list": ["mdev", "list"],
}


def reading_commands(host: Host) -> dict[str, list[str]]:
    """The reading commands, and `show` and `why` of each device, by `name` or `name/device`."""
    found = dict(PLAIN)
    devices = [*list_addresses(host), *(mdev.uuid for mdev in read_mdevs(host))]
    for device in devices:
        found[f"show/{device}"] = ["show", device]
        found[f"why/{device}"] = ["why", device]
    return found


def run(command: list[str], root: str | None = None) -> tuple[int, str]:
    """A command's exit code and its standard output with --json."""
    out, err = io.StringIO(), io.StringIO()
    globals_ = ["--json"] if root is None else ["--root", root, "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*globals_, *command])
    return code, out.getvalue()
