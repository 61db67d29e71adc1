"""What a live host tells only through other processes' tables, netlink or a probe.

Each observation is a text under a name below `host.OBSERVED`; `OsTree.read` makes it when the
name is read, and a snapshot keeps it like any file. Fields are separated by one tab; control
characters in names are escaped. A line that begins with `!` counts what could not be seen, and
why: without root much is hidden, and an answer must say so. A table's last line is a single
point: one that is missing was cut short.

    addresses           interface, address/prefix
    net-kinds           interface, kind of a virtual one (`team`, `macvlan`)
    net-links           of every network namespace: the namespace (`self`, a pid, a path), index,
                        name, kind; namespace (`?`: any) and index of the interface that it stands
                        on; index of its master; its device's path below /sys; addresses with
                        commas; `xdp`
    net-routes          interface, a route of it (`default via 10.0.0.1 table 100`)
    net-traffic         interface; `redirected` (tc sends it packets), `filtered` (tc filters see
                        its own), `programmed` (BPF programs of tcx do) or a socket that is bound
                        to it (`udp port 67`); `vsock:` and what a socket of that family does
    caller              server address, client address of the SSH session of the caller, if any
    open-nodes          pid, command, node, the device's path below /sys (`?` of a VFIO device
                        that the kernel does not tell, `char/195:0` of one without a path)
    mounts              pid (or `self`, or a namespace's path), a line of its mountinfo
    block-claim/NAME    `claimed`, `free`, or `unknown` and an errno
    block-loops         loop device, `major:minor` of the block device below it
    block-targets       subsystem of the NVMe target, namespace (or `passthru`), path, `major:minor`
    vfio-claim/GROUP    as block-claim, of a VFIO group
    other-tools         tool, file, device, setting (host_claims.py)
    eswitch/ADDRESS     `legacy`, `switchdev`, `none` for a driver without, `unknown` and an errno
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from vfiotool.errors import VfiotoolError
from vfiotool.host import observe_files, observe_net, probe
from vfiotool.host.claims import claims
from vfiotool.host.paths import (
    BLOCK_CLAIM,
    BLOCK_LOOPS,
    BLOCK_TARGETS,
    ESWITCH,
    MOUNTS,
    NET_ADDRESSES,
    NET_CALLER,
    NET_KINDS,
    NET_LINKS,
    NET_ROUTES,
    NET_TRAFFIC,
    OBSERVED_END,
    OPEN_NODES,
    OTHER_TOOLS,
    PROC,
    VFIO_CLAIM,
)
from vfiotool.host.processes import plain


def observe(path: str, root: str = "") -> bytes:
    """The observation of that name, made now.

    `root` counts for `other-tools` alone, whose files any tree can hold. Raises FileNotFoundError
    for an unknown name, and OSError where it could not be made: that is no empty observation.
    """
    if path == OTHER_TOOLS:
        return claims(root).encode("utf-8", "backslashreplace")
    folder, _, name = path.rpartition("/")
    asked = _QUESTIONS.get(folder)
    maker = _MAKERS.get(path)
    try:
        if asked is not None:
            text = asked(name)
        elif maker is not None:
            text = f"{maker()}{OBSERVED_END}\n"
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    except VfiotoolError as error:
        raise OSError(errno.EIO, str(error), path) from error
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), path) from error
    return text.encode("utf-8", "backslashreplace")


def caller() -> str:
    """The SSH session in which this command runs, found through the parents' environments.

    `sudo` and `su -` drop SSH_CONNECTION, so the processes above are asked too.
    """
    pid = os.getpid()
    for _ in range(64):
        try:
            with open(f"{PROC}/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            with open(f"{PROC}/{pid}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return ""
        for entry in environment:
            if entry.startswith(b"SSH_CONNECTION="):
                words = entry.partition(b"=")[2].decode("ascii", "replace").split()
                if len(words) == 4:
                    return f"{plain(words[2])}\t{plain(words[0])}\n"
        if parent in (0, pid):
            return ""
        pid = parent
    return ""


_MAKERS: dict[str, Callable[[], str]] = {
    NET_ADDRESSES: observe_net.addresses,
    NET_KINDS: observe_net.net_kinds,
    NET_LINKS: observe_net.net_links,
    NET_ROUTES: observe_net.net_routes,
    NET_TRAFFIC: observe_net.net_traffic,
    NET_CALLER: caller,
    OPEN_NODES: observe_files.open_nodes,
    MOUNTS: observe_files.mounts,
    BLOCK_LOOPS: probe.loops,
    BLOCK_TARGETS: probe.targets,
}
_QUESTIONS: dict[str, Callable[[str], str]] = {
    BLOCK_CLAIM: probe.block_claim,
    VFIO_CLAIM: probe.vfio_claim,
    ESWITCH: probe.eswitch,
}
