"""Open device nodes and mounts, as the tables of all processes tell them."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from vfiotool.host.in_flight import files_in_flight, waiting
from vfiotool.host.namespaces import find_namespaces
from vfiotool.host.paths import (
    OWN_FILES,
    PROC,
    PROC_PCI,
    SYS,
    SYS_BLOCK,
    SYS_DEV_NUMBERS,
    SYS_PCI_DEVICES,
)
from vfiotool.host.probe import answer_of
from vfiotool.host.processes import (
    DENIED,
    GONE,
    command,
    counted,
    enter_namespace,
    living,
    plain,
    processes,
    tables_of,
    type_and_number,
    unlisted,
)

# Memory and terminals: open everywhere, and no part of any device (admin-guide/devices.txt).
_COMMON_MAJORS = frozenset({1, 5, *range(136, 144)})
_FUSE = (10, 229)
_MEMORY = (1, 1)
_PCI_FILE = re.compile(r".*(/devices/pci.*)/(resource\d\w*|config|rom)")
# The older way to a function's registers: `ioctl` and `mmap` (drivers/pci/proc.c).
_PCI_PROC = re.compile(rf".*{PROC_PCI}/([0-9a-f:]+)/([0-9a-f]{{2}}\.[0-7])")
_VFIO_DEVICE = "anon_inode:[vfio-device]"
_IO_URING = "anon_inode:[io_uring]"
# The line of fdinfo that tells which device it is (drivers/vfio/vfio_main.c, since Linux 6.17).
_SYSPATH = "vfio-device-syspath:"
# `    0: /dev/nvme0n1` below `UserFiles:` (io_uring/fdinfo.c).
_REGISTERED = re.compile(r"\s*\d+: (.+)")
_TRIES = 5
# include/uapi/linux/io_uring.h: the parts of a ring that are mapped, each once for a ring; which of
# them, is up to the program.
_RING_PARTS = (0, 0x8000000, 0x10000000)
# include/linux/ioport.h: a region of memory, not of ports.
_IORESOURCE_MEM = 0x200

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
    text += [f"!\t{what}" for what in (*sorted(looked.unknown), *unlisted())]
    if hidden:
        text.append(f"!\tthe open files of {counted(hidden)} that may not be looked into")
    return "".join(f"{line}\n" for line in text)


class _Nodes:
    """Which device is behind a node's number, each looked up once."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self.sockets: dict[str, list[Node]] = {}
        self._functions: list[tuple[int, int, str]] | None = None
        self._devices: dict[tuple[str, int, int], str] = {}
        self._regular: set[str] = set()
        # Of the files that are mapped, those that are the host's memory.
        self.memories: set[str] = set()

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

    def memory(self, first: int, last: int) -> Iterator[str]:
        """The functions whose registers lie at physical addresses, as `/dev/mem` gives them."""
        if self._functions is None:
            self._functions = list(_registers())
        yield from (path for start, end, path in self._functions if start <= last and first <= end)

    def mapped(self, path: str, file: str, called: str) -> Node | None:
        """As `of`, for a mapping; `file` tells files apart, so that libraries are asked once."""
        if file in self._regular:
            return None
        found = self.of(path, called)
        if found is None:
            self._regular.add(file)
            mode, *number = type_and_number(path)
            if stat.S_ISCHR(mode) and tuple(number) == _MEMORY:
                self.memories.add(file)
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
        device = _function_of(target)
        if device is not None:
            yield plain(target), device
            return
        found = looked.of(link, target)
        if found is not None:
            yield found
    elif target == _VFIO_DEVICE:
        told = [line for line in _info(table, number) if line.startswith(_SYSPATH)]
        yield target, told[0].partition(":")[2].strip() if told else "?"
    elif target == _IO_URING:
        yield from _registered(pid, table, number, looked)
    elif target.startswith("socket:"):
        yield from _in_flight(pid, table, number, target, looked)


def _function_of(path: str) -> str | None:
    """The function below /sys of which a path names a file of registers, wherever it is mounted."""
    match = _PCI_FILE.fullmatch(path)
    if match is not None:
        return f"{SYS}{match[1]}"
    match = _PCI_PROC.fullmatch(path)
    if match is None:
        return None
    bus = match[1] if match[1].count(":") else f"0000:{match[1]}"
    return os.path.realpath(f"{SYS_PCI_DEVICES}/{bus}:{match[2]}")


def _in_flight(pid: int, table: str, number: str, target: str, looked: _Nodes) -> Iterator[Node]:
    """Nodes that wait in a socket for somebody to take them, each socket asked once."""
    if target not in looked.sockets:
        looked.sockets[target] = []
        count = waiting(_info(table, number))
        if count:
            looked.sockets[target] = list(_waiting_in(pid, table, number, count, looked))
    yield from looked.sockets[target]


def _waiting_in(pid: int, table: str, number: str, count: int, looked: _Nodes) -> Iterator[Node]:
    task = int(table.split("/")[-2])
    unknown = f"on their way through a socket of pid {pid}"

    def look(descriptor: str) -> Iterator[str]:
        inner = _Nodes()
        # What waits in a socket is asked of it by files_in_flight, not of its number here.
        if not os.readlink(f"{OWN_FILES}/{descriptor}").startswith("socket:"):
            yield from map("\t".join, _node_of(pid, OWN_FILES, descriptor, inner))
        yield from (f"!\t{what}" for what in inner.unknown)

    try:
        lines = files_in_flight(pid, task, int(number), look)
    except OSError as error:
        if error.errno != errno.ETIMEDOUT:
            raise
        lines = [f"!\t{count} files"]
    for line in lines:
        first, _, second = line.partition("\t")
        if first == "!":
            looked.unknown.add(f"{second} {unknown}")
        else:
            yield first, second


def _registers() -> Iterator[tuple[int, int, str]]:
    """First and last physical address of each region of each PCI function, and its path."""
    for name in os.listdir(SYS_PCI_DEVICES):
        path = f"{SYS_PCI_DEVICES}/{name}"
        with open(f"{path}/resource", encoding="ascii") as file:
            regions = [[int(word, 16) for word in line.split()] for line in file]
        for start, end, flags in regions:
            if flags & _IORESOURCE_MEM:
                yield start, end, os.path.realpath(path)


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
    task, parts = living(pid), dict.fromkeys(_RING_PARTS, 0)
    with open(f"{PROC}/{task}/maps", encoding="utf-8", errors="backslashreplace") as file:
        lines = file.read().splitlines()
    for line in lines:
        words = line.split(None, 5)
        if len(words) < 6 or words[5].startswith("["):
            continue
        span, _, offset, number, inode, called = words
        if called == _VFIO_DEVICE:
            yield called, "?"
        elif called == _IO_URING:
            if int(offset, 16) in parts:
                parts[int(offset, 16)] += 1
        elif called.startswith("/"):
            try:
                yield from _mapping(task, span, offset, (f"{number} {inode}", called), looked)
            except OSError as error:
                # Gone meanwhile; or a name whose numbers are padded otherwise in the two places.
                if error.errno not in GONE:
                    raise
    # A ring lives on while it is mapped, and with it what is registered with it.
    rings = max(parts.values())
    if rings and rings > _rings(pid):
        looked.unknown.add(f"the files registered with io_uring by pid {pid}, which closed it")


def _mapping(
    task: int, span: str, offset: str, file: tuple[str, str], looked: _Nodes
) -> Iterator[Node]:
    number, called = file
    device = _function_of(called)
    if device is not None:
        yield plain(called), device
        return
    path = f"{PROC}/{task}/map_files/{span}"
    found = looked.mapped(path, number, called)
    if found is not None:
        yield found
    elif number in looked.memories:
        first, last = (int(end, 16) for end in span.split("-"))
        start = int(offset, 16)
        for device in looked.memory(start, start + last - first - 1):
            yield plain(called), device


def _rings(pid: int) -> int:
    """How many io_urings the process has descriptors of."""
    found = 0
    for table in tables_of(pid):
        for number in os.listdir(table):
            try:
                found += os.readlink(f"{table}/{number}") == _IO_URING
            except OSError as error:
                if error.errno not in GONE:
                    raise
    return found


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
