"""VDUSE devices as a host has them: who serves each, and whether anybody still does.

The kernel's part of a device outlives its server (Documentation/userspace-api/vduse.rst). Requests
then wait for ever, and taking the device off the vDPA bus hangs with a lock that all of vDPA needs.
Reading this opens no device, so it cannot hang with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.host.host import Host
from vfiotool.host.paths import DEV, OPEN_NODES, PROC, SYS_BLOCK, SYS_VDPA_DEVICES, SYS_VDUSE


@dataclass(frozen=True, slots=True)
class VduseNode:
    """A device that was made by /dev/vduse/control.

    `state` is `served`; `mute` (its server holds it and is stopped, or the driver gave up waiting
    for its answers); `abandoned` (nobody holds it); or `unknown` where open files cannot be seen.
    `driver`, `node` and `disks` are those of its vDPA device; `in_flight` counts the requests that
    the host's disks wait for, None where the host has no disk of it.
    """

    name: str
    state: str
    pid: int | None
    command: str | None
    on_bus: bool
    driver: str | None
    node: str | None
    disks: tuple[str, ...]
    in_flight: int | None

    @property
    def waits(self) -> bool:
        """Whether taking it off the vDPA bus now would wait for a server that does not answer."""
        return self.state in ("abandoned", "mute") and self.driver is not None


def read_vduse(host: Host) -> tuple[VduseNode, ...]:
    """All VDUSE devices, by name; none where the kernel has no VDUSE."""
    names = [name for name in host.listdir(SYS_VDUSE) if name != "control"]
    if not names:
        return ()
    holders, hidden = _holders(host)
    return tuple(_read(host, name, holders.get(name), hidden) for name in sorted(names))


def _holders(host: Host) -> tuple[dict[str, tuple[int, str]], bool]:
    """Who has which device open, and whether there may be others that cannot be seen."""
    found: dict[str, tuple[int, str]] = {}
    told = host.read(OPEN_NODES)
    for line in (told or "").splitlines():
        fields = line.split("\t")
        if len(fields) == 4 and "/vduse/" in fields[3] and fields[0].isdecimal():
            found.setdefault(fields[3].rpartition("/")[2], (int(fields[0]), fields[1]))
    return found, told is None or any(line.startswith("!") for line in told.splitlines())


def _read(host: Host, name: str, holder: tuple[int, str] | None, hidden: bool) -> VduseNode:
    base = f"{SYS_VDPA_DEVICES}/{name}"
    children = host.listdir(base)
    virtio = [child for child in children if re.fullmatch(r"virtio\d+", child)]
    disks = tuple(disk for child in virtio for disk in host.listdir(f"{base}/{child}/block"))
    node = next((child for child in children if child.startswith("vhost-vdpa-")), None)
    if holder is None:
        state = "unknown" if hidden else "abandoned"
    else:
        gave_up = any(host.linkname(f"{base}/{child}/driver") is None for child in virtio)
        state = "mute" if gave_up or _is_stopped(host, holder[0]) else "served"
    return VduseNode(
        name=name,
        state=state,
        pid=None if holder is None else holder[0],
        command=None if holder is None else holder[1],
        on_bus=host.exists(base),
        driver=host.linkname(f"{base}/driver"),
        node=None if node is None else f"{DEV}/{node}",
        disks=disks,
        in_flight=_in_flight(host, disks),
    )


def _is_stopped(host: Host, pid: int) -> bool:
    # proc(5): the state is the first field after the command, which may hold anything.
    stat = (host.read(f"{PROC}/{pid}/stat") or "").rpartition(")")[2].split()
    return bool(stat) and stat[0] in "Tt"


def _in_flight(host: Host, disks: tuple[str, ...]) -> int | None:
    if not disks:
        return None
    texts = [host.read(f"{SYS_BLOCK}/{disk}/inflight") or "" for disk in disks]
    return sum(int(word) for text in texts for word in text.split() if word.isdecimal())
