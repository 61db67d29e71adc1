"""What a live host tells only through other processes' tables, netlink or a probe.

Each observation is a text under a name below `host.OBSERVED`; `OsTree.read` makes it when the
name is read, and a snapshot keeps it like any file. Fields are separated by one tab; control
characters in names are escaped. A line that begins with `!` counts what could not be seen, and
why: without root much is hidden, and an answer must say so. A table's last line is a single
point: one that is missing was cut short.

    addresses           interface, address/prefix
    net-kinds           interface, kind of a virtual one (`team`, `macvlan`)
    net-namespaces      pid, interface, its device's path below /sys, addresses with commas
    caller              server address, client address of the SSH session of the caller, if any
    open-nodes          pid, command, node, the device's path below /sys
    mounts              pid (or `self`), a line of its mountinfo
    block-claim/NAME    `claimed`, `free`, or `unknown` and an errno
    other-tools         tool, file, device, setting (host_claims.py)
    eswitch/ADDRESS     `legacy`, `switchdev`, `none` for a driver without, `unknown` and an errno
"""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import time
from collections.abc import Callable, Iterator

from vfiotool.host.child import abandon, leave_parent
from vfiotool.host.claims import claims
from vfiotool.host.paths import (
    BLOCK_CLAIM,
    DEV,
    ESWITCH,
    MOUNTS,
    NET_ADDRESSES,
    NET_CALLER,
    NET_KINDS,
    NET_NAMESPACES,
    OBSERVED_END,
    OPEN_NODES,
    OTHER_TOOLS,
    PROC,
)

# A loaded host may be slow to fork; a use that was missed costs more than the wait.
_DEADLINE_S = 10.0
_END = b"\0"
_SILENT = "the network namespace"
_SYS_DEV = "/sys/dev"
_SYS_BUS = "/sys/bus"
# Memory and terminal nodes: open everywhere, and no part of any device (admin-guide/devices.txt).
_COMMON = re.compile(r"/dev/(null|zero|full|u?random|tty|pts/.*|ptmx|console|kmsg|fuse|shm/.*)")
_PCI_FILE = re.compile(r"(/sys/devices/pci.*)/(resource\d\w*|config|rom)")
_NODE = re.compile(r".*(/dev/.+?)( \(deleted\))?")


def observe(path: str, root: str = "") -> bytes:
    """The observation of that name, made now. Raises FileNotFoundError for an unknown name.

    `root` counts for `other-tools` alone, whose files any tree can hold.
    """
    if path == OTHER_TOOLS:
        return claims(root).encode("utf-8", "backslashreplace")
    if path.startswith(BLOCK_CLAIM + "/"):
        text = block_claim(path.removeprefix(BLOCK_CLAIM + "/"))
    elif path.startswith(ESWITCH + "/"):
        text = eswitch(path.removeprefix(ESWITCH + "/"))
    else:
        maker = _MAKERS.get(path)
        if maker is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        text = f"{maker()}{OBSERVED_END}\n"
    return text.encode("utf-8", "backslashreplace")


def open_nodes() -> str:
    """Who has device nodes or PCI resource files open; this process itself is left out.

    Terminals, memory and other nodes that belong to no device are passed over. Survives processes
    that end meanwhile; those whose tables may not be read are counted.
    """
    lines: set[tuple[int, str, str, str]] = set()
    hidden = 0
    sysfs: dict[str, str] = {}
    for pid in _processes():
        if pid == os.getpid():
            continue
        try:
            descriptors = os.listdir(f"{PROC}/{pid}/fd")
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue
        for number in descriptors:
            found = _node_of(f"{PROC}/{pid}/fd/{number}", sysfs)
            if found is not None:
                lines.add((pid, _command(pid), *found))
    text = [f"{pid}\t{command}\t{node}\t{device}" for pid, command, node, device in sorted(lines)]
    if hidden:
        text.append(f"!\tthe open files of {hidden} processes that may not be looked into")
    return "".join(f"{line}\n" for line in text)


def _node_of(link: str, sysfs: dict[str, str]) -> tuple[str, str] | None:
    """A descriptor's node and the device behind it, or None if it is no device's node."""
    try:
        # Never stat before the name is known: a descriptor may lead to a dead network mount.
        target = os.readlink(link)
    except OSError:
        return None
    if "/dev/" not in target:
        # Nearly all descriptors: sockets, pipes, plain files.
        match = _PCI_FILE.fullmatch(target) if target.startswith("/sys/") else None
        return None if match is None else (_plain(target), match.group(1))
    match = _NODE.fullmatch(target)
    if match is None or _COMMON.fullmatch(match.group(1)):
        return None
    if target not in sysfs:
        # A node in a chroot or container is looked up by the name it has there.
        path = link if target.startswith(f"{DEV}/") else match.group(1)
        sysfs[target] = _device_of(path)
    return (_plain(target), sysfs[target]) if sysfs[target] else None


def _device_of(path: str) -> str:
    """The device's path below /sys of a character or block node, or an empty string."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    kind = "block" if stat.S_ISBLK(status.st_mode) else "char"
    if kind == "char" and not stat.S_ISCHR(status.st_mode):
        return ""
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    try:
        target = os.readlink(f"{_SYS_DEV}/{kind}/{number}")
    except OSError:
        return "-"
    return _plain(os.path.normpath(f"{_SYS_DEV}/{kind}/{target}"))


def mounts() -> str:
    """The mount tables of all mount namespaces, this one's first."""
    text = [f"self\t{line}\n" for line in _mountinfo("self")]
    seen = {_namespace("self")}
    hidden = 0
    for pid in _processes():
        try:
            name = os.readlink(f"{PROC}/{pid}/ns/mnt")
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue
        if name not in seen:
            seen.add(name)
            text += [f"{pid}\t{line}\n" for line in _mountinfo(str(pid))]
    if hidden:
        text.append(f"!\tthe mount tables of {hidden} processes that may not be looked into\n")
    return "".join(text)


def _mountinfo(pid: str) -> list[str]:
    try:
        with open(f"{PROC}/{pid}/mountinfo", encoding="utf-8", errors="backslashreplace") as table:
            return table.read().splitlines()
    except OSError:
        return []


def _namespace(pid: str) -> str | None:
    try:
        return os.readlink(f"{PROC}/{pid}/ns/mnt")
    except OSError:
        return None


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
                    return f"{_plain(words[2])}\t{_plain(words[0])}\n"
        if parent in (0, pid):
            return ""
        pid = parent
    return ""


def block_claim(name: str) -> str:
    """Whether the kernel has claimed a block device, as mkfs and fdisk find out: O_EXCL is EBUSY.

    It tells of users that no table names: ZFS, kernel targets, external journals, lazily
    unmounted file systems. Opened for reading only, in a child with a deadline.
    """
    if "/" in name or name.startswith("."):
        return "unknown EINVAL\n"
    flags = os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
    path = f"{DEV}/{name.replace('!', '/')}"

    def probe() -> str:
        try:
            os.close(os.open(path, flags))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return "claimed\n"
            return f"unknown {errno.errorcode.get(error.errno or 0, str(error.errno))}\n"
        return "free\n"

    return _ask_child(probe) or "unknown ETIMEDOUT\n"


def eswitch(address: str) -> str:
    """A PCI function's eswitch mode, asked in a child: devlink answers under the device's lock."""
    from vfiotool.errors import Unsupported, VfiotoolError
    from vfiotool.netlink.devlink import read_eswitch

    def ask() -> str:
        try:
            return f"{read_eswitch(address, _DEADLINE_S) or 'none'}\n"
        except Unsupported:
            return "none\n"
        except VfiotoolError as error:
            return f"unknown {error.errno_name}\n"

    return _ask_child(ask) or "unknown ETIMEDOUT\n"


def addresses() -> str:
    """This network namespace's interface addresses, by rtnetlink."""
    from vfiotool.netlink.route import read_addresses

    return "".join(f"{name}\t{cidr}\n" for name, cidr in read_addresses())


def net_kinds() -> str:
    """The virtual interfaces of this network namespace and what they are, by rtnetlink."""
    from vfiotool.netlink.route import read_links

    return "".join(f"{_plain(link.name)}\t{link.kind}\n" for link in read_links() if link.kind)


def net_namespaces() -> str:
    """Interfaces with a parent device that live in other network namespaces."""
    from vfiotool.netlink.route import read_addresses, read_links

    text = []
    hidden = 0
    try:
        seen = {os.stat(f"{PROC}/self/ns/net").st_ino}
    except OSError:
        seen = set()
    for pid in _processes():
        try:
            number = os.stat(f"{PROC}/{pid}/ns/net").st_ino
            if number in seen:
                continue
            descriptor = os.open(f"{PROC}/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue
        seen.add(number)

        def look(descriptor: int = descriptor, pid: int = pid) -> str:
            _enter_net_namespace(descriptor)
            cidrs: dict[str, list[str]] = {}
            for name, cidr in read_addresses():
                cidrs.setdefault(name, []).append(cidr)
            return "".join(
                f"{pid}\t{_plain(link.name)}\t{device}\t{','.join(cidrs.get(link.name, []))}\n"
                for link in read_links()
                if (device := _parent_of(link.parent_bus, link.parent_device))
            )

        answer = _ask_child(look, keep=descriptor)
        text.append(f"!\t{_SILENT} of pid {pid}\n" if answer is None else answer)
        os.close(descriptor)
    if hidden:
        text.append(
            f"!\tthe network namespaces of {hidden} processes that may not be looked into\n"
        )
    return "".join(text)


def _parent_of(bus: str | None, name: str | None) -> str:
    """The path below /sys of an interface's parent device, or an empty string."""
    link = f"{_SYS_BUS}/{bus}/devices/{name}"
    try:
        target = os.readlink(link)
    except (OSError, ValueError):
        return ""
    return _plain(os.path.normpath(os.path.join(os.path.dirname(link), target)))


def _enter_net_namespace(descriptor: int) -> None:
    import ctypes

    clone_newnet = 0x40000000  # include/uapi/linux/sched.h
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ask_child(
    question: Callable[[], str], timeout_s: float = _DEADLINE_S, keep: int | None = None
) -> str | None:
    """What `question` answers in a child of its own; None if it fails or misses the deadline.

    An answer ends with a mark, so that an empty one is none of a child that died.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            leave_parent(*(descriptor for descriptor in (writer, keep) if descriptor is not None))
            data = question().encode("utf-8", "backslashreplace") + _END
            while data:
                data = data[os.write(writer, data) :]
        finally:
            os._exit(0)
    os.close(writer)
    parts: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([reader], [], [], left)[0]:
                return None
            piece = os.read(reader, 1 << 16)
            if not piece:
                whole = b"".join(parts)
                return whole.removesuffix(_END).decode() if whole.endswith(_END) else None
            parts.append(piece)
    finally:
        os.close(reader)
        abandon(child)


def _processes() -> Iterator[int]:
    try:
        names = os.listdir(PROC)
    except OSError:
        return
    yield from sorted(int(name) for name in names if name.isdecimal())


def _command(pid: int) -> str:
    try:
        with open(f"{PROC}/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
            return _plain(file.read().rstrip("\n")) or "?"
    except OSError:
        return "?"


def _plain(text: str) -> str:
    """Without control characters, so that a name cannot break the format."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_MAKERS: dict[str, Callable[[], str]] = {
    NET_ADDRESSES: addresses,
    NET_KINDS: net_kinds,
    NET_NAMESPACES: net_namespaces,
    NET_CALLER: caller,
    OPEN_NODES: open_nodes,
    MOUNTS: mounts,
}
