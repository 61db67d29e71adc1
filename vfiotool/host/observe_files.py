"""Open device nodes and mounts, as the tables of all processes tell them."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from vfiotool.host.namespaces import find_namespaces
from vfiotool.host.paths import PROC, SYS, SYS_BLOCK, SYS_DEV_NUMBERS
from vfiotool.host.probe import answer_of
from vfiotool.host.processes import (
    DENIED,
    GONE,
    command,
    counted,
    enter_namespace,
    plain,
    processes,
    tables_of,
    type_and_number,
)

# Memory and terminals: open everywhere, and no part of any device (admin-guide/devices.txt).
_COMMON_MAJORS = frozenset({1, 5, *range(136, 144)})
_FUSE = (10, 229)
_PCI_FILE = re.compile(r".*(/devices/pci.*)/(resource\d\w*|config|rom)")
_VFIO_DEVICE = "anon_inode:[vfio-device]"
_IO_URING = "anon_inode:[io_uring]"
# The line of fdinfo that tells which device it is (drivers/vfio/vfio_main.c, since Linux 6.17).
_SYSPATH = "vfio-device-syspath:"
# `    0: /dev/nvme0n1` below `UserFiles:` (io_uring/fdinfo.c).
_REGISTERED = re.compile(r"\s*\d+: (.+)")
_TRIES = 5

# A node as it is called by who has it, and the device's path below /sys.
Node = tuple[str, str]


def open_nodes() -> str:
    """Who has device nodes or PCI resource files open or mapped; this process itself is left out.

    By the node's number, wherever it lies and whatever it is called. Terminals and memory are
    passed over; processes that end meanwhile too; those that may not be looked into are counted.
    """
    lines: set[tuple[int, str, str, str]] = set()
    hidden = 0
    looked = _Nodes()
    for pid in processes():
        if pid == os.getpid():
            continue
        try:
            found = {*_open(pid, looked), *_mapped(pid, looked)}
        except OSError as error:
            if error.errno in GONE:
                continue
            if error.errno not in DENIED:
                raise
            hidden += 1
            continue
        if found:
            name = command(pid)
            lines |= {(pid, name, *node) for node in found}
    text = [f"{pid}\t{name}\t{node}\t{device}" for pid, name, node, device in sorted(lines)]
    text += [f"!\t{what}" for what in sorted(looked.unknown)]
    if hidden:
        text.append(f"!\tthe open files of {counted(hidden)} that may not be looked into")
    return "".join(f"{line}\n" for line in text)


class _Nodes:
    """Which device is behind a node's number, each looked up once."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self._devices: dict[tuple[str, int, int], str] = {}
        self._regular: set[str] = set()

    def of(self, path: str, called: str) -> Node | None:
        """The node at `path`; None if it is no device's. Raises OSError."""
        mode, major, minor = type_and_number(path)
        if stat.S_ISBLK(mode):
            return plain(called), self._device("block", major, minor)
        if not stat.S_ISCHR(mode) or major in _COMMON_MAJORS or (major, minor) == _FUSE:
            return None
        return plain(called), self._device("char", major, minor)

    def _device(self, kind: str, major: int, minor: int) -> str:
        key = (kind, major, minor)
        if key not in self._devices:
            base = f"{SYS_DEV_NUMBERS}/{kind}"
            try:
                target = os.readlink(f"{base}/{major}:{minor}")
                self._devices[key] = plain(os.path.normpath(f"{base}/{target}"))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                # A driver that shows sysfs no device of its own: NVIDIA's.
                self._devices[key] = f"{kind}/{major}:{minor}"
        return self._devices[key]

    def mapped(self, path: str, file: str, called: str) -> Node | None:
        """As `of`, for a mapping; `file` tells files apart, so that libraries are asked once."""
        if file in self._regular:
            return None
        found = self.of(path, called)
        if found is None:
            self._regular.add(file)
        return found


def _open(pid: int, looked: _Nodes) -> Iterator[Node]:
    for table in tables_of(pid):
        for number in os.listdir(table):
            try:
                yield from _node_of(pid, table, number, looked)
            except OSError as error:
                # The descriptor was closed meanwhile.
                if error.errno not in GONE:
                    raise


def _node_of(pid: int, table: str, number: str, looked: _Nodes) -> Iterator[Node]:
    link = f"{table}/{number}"
    target = os.readlink(link)
    if target.startswith("/"):
        match = _PCI_FILE.fullmatch(target)
        if match is not None:
            yield plain(target), f"{SYS}{match[1]}"
            return
        found = looked.of(link, target)
        if found is not None:
            yield found
    elif target == _VFIO_DEVICE:
        told = [line for line in _info(table, number) if line.startswith(_SYSPATH)]
        yield target, told[0].partition(":")[2].strip() if told else "?"
    elif target == _IO_URING:
        yield from _registered(pid, table, number, looked)


def _info(table: str, number: str) -> list[str]:
    path = f"{table.removesuffix('fd')}fdinfo/{number}"
    with open(path, encoding="utf-8", errors="backslashreplace") as file:
        return file.read().splitlines()


def _registered(pid: int, table: str, number: str, looked: _Nodes) -> Iterator[Node]:
    """The files registered with an io_uring, which stay open though no descriptor shows them.

    The kernel tells them by path, older ones by the last name of it, and not at all while the
    ring is locked.
    """
    for _ in range(_TRIES):
        lines = _info(table, number)
        if any(line.startswith("UserFiles:") for line in lines):
            break
    else:
        looked.unknown.add(f"the files registered with io_uring by pid {pid}")
        return
    start = next(n for n, line in enumerate(lines) if line.startswith("UserFiles:"))
    for line in lines[start + 1 :]:
        match = _REGISTERED.fullmatch(line)
        if match is None:
            return
        called = match[1]
        if called.startswith("/"):
            try:
                found = looked.of(f"{PROC}/{pid}/root{called}", called)
            except OSError:
                looked.unknown.add(f"{plain(called)}, registered with io_uring by pid {pid}")
                continue
            if found is not None:
                yield found
        elif os.path.exists(f"{SYS_BLOCK}/{called}"):
            yield plain(called), os.path.realpath(f"{SYS_BLOCK}/{called}")


def _mapped(pid: int, looked: _Nodes) -> Iterator[Node]:
    """Nodes that are mapped, though their descriptors may be closed."""
    with open(f"{PROC}/{pid}/maps", encoding="utf-8", errors="backslashreplace") as file:
        lines = file.read().splitlines()
    for line in lines:
        words = line.split(None, 5)
        if len(words) < 6 or words[5].startswith("["):
            continue
        span, _, _, device, inode, called = words
        if called == _VFIO_DEVICE:
            yield called, "?"
            continue
        match = _PCI_FILE.fullmatch(called) if called.startswith("/") else None
        if match is not None:
            yield plain(called), f"{SYS}{match[1]}"
        elif called.startswith("/"):
            try:
                found = looked.mapped(f"{PROC}/{pid}/map_files/{span}", f"{device} {inode}", called)
            except OSError as error:
                # Gone meanwhile; or a name whose numbers are padded otherwise in the two places.
                if error.errno not in GONE:
                    raise
                continue
            if found is not None:
                yield found


def mounts() -> str:
    """The mount tables of all mount namespaces, this one's first.

    Also of those that no process is in, but a mount or a descriptor keeps.
    """
    text = [f"self\t{line}\n" for line in _mountinfo("self") or ()]
    found = find_namespaces("mnt")
    for number, places in found.places.items():
        if number == found.own:
            continue
        table = None
        for place in places:
            table = _mountinfo(place.pid) if place.pid else _inside(place.path)
            if table is not None:
                text += [f"{place.name}\t{line}\n" for line in table]
                break
        if table is None and any(place.lasts for place in places):
            text.append(f"!\tthe mount table of {places[0].name}\n")
    text += [f"!\t{what}\n" for what in found.unknown]
    if found.hidden:
        text.append(f"!\tthe mount tables of {counted(found.hidden)} that may not be looked into\n")
    return "".join(text)


def _mountinfo(pid: str) -> list[str] | None:
    """A process's mount table; None if it has ended. Raises OSError."""
    try:
        with open(f"{PROC}/{pid}/mountinfo", encoding="utf-8", errors="backslashreplace") as table:
            return table.read().splitlines()
    except OSError as error:
        # A process that is ending has no namespace left (EINVAL).
        if error.errno in (*GONE, errno.EINVAL):
            return None
        raise


def _inside(path: str) -> list[str] | None:
    """The mount table of a namespace that no process is in: a child of ours goes there to see."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None

    def look() -> str:
        # Of this mount of /proc: the namespace may have none.
        process = os.open(f"{PROC}/self", os.O_RDONLY | os.O_DIRECTORY)
        enter_namespace(descriptor)
        table = os.open("mountinfo", os.O_RDONLY, dir_fd=process)
        with open(table, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()

    try:
        return answer_of(look, keep=(descriptor,)).splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
