"""The only door to the host: `/sys`, `/proc`, `/dev`, and the kernel's address tables.

A `Host` reads from a tree. The live tree is the machine itself; a directory laid out like `/`
stands for another machine; a `MemoryTree` holds a snapshot (`snapshot.py`) or a test's fake
kernel. Everything above this module takes a `Host` and cannot tell them apart.

Writing goes through `Host.write` alone. On a live host each write runs in a disposable child
with a deadline, because unbind, remove, reset and a change of VFs block for as long as a user
holds the device (FACTS; Documentation/driver-api/vfio.rst, "release" of a device in use).
"""

from __future__ import annotations

import errno
import os

from vfiotool.errors import Stuck, UsageError, from_oserror

# Importing these would take a third of the time that `groups` takes to list a small host.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Protocol

    from vfiotool.host_child import DoorChild
    from vfiotool.netlink import Message, Request
else:
    Protocol = object

SYS_BUS = "/sys/bus"
SYS_PCI_DEVICES = "/sys/bus/pci/devices"
SYS_PCI_DRIVERS = "/sys/bus/pci/drivers"
SYS_PCI_SLOTS = "/sys/bus/pci/slots"
SYS_PCI_PROBE = "/sys/bus/pci/drivers_probe"
SYS_IOMMU_GROUPS = "/sys/kernel/iommu_groups"
SYS_IOMMU = "/sys/class/iommu"
SYS_MDEV_PARENTS = "/sys/class/mdev_bus"
SYS_MDEV_DEVICES = "/sys/bus/mdev/devices"
SYS_MDEV_DRIVERS = "/sys/bus/mdev/drivers"
SYS_VDPA_DEVICES = "/sys/bus/vdpa/devices"
SYS_VDPA_DRIVERS = "/sys/bus/vdpa/drivers"
SYS_VDPA_PROBE = "/sys/bus/vdpa/drivers_probe"
SYS_VDPA_AUTOPROBE = "/sys/bus/vdpa/drivers_autoprobe"
SYS_BLOCK = "/sys/class/block"
SYS_NET = "/sys/class/net"
SYS_DRM = "/sys/class/drm"
SYS_GRAPHICS = "/sys/class/graphics"
SYS_VTCONSOLE = "/sys/class/vtconsole"
SYS_VFIO_DEV = "/sys/class/vfio-dev"
SYS_MODULE = "/sys/module"
SYS_DEVICES = "/sys/devices"
SYS_NODES = "/sys/devices/system/node"
SYS_FS_BTRFS = "/sys/fs/btrfs"
SYS_FS_BCACHEFS = "/sys/fs/bcachefs"
SYS_NVME_TARGETS = "/sys/kernel/config/nvmet/subsystems"
SYS_NVME_SUBSYSTEM = "/sys/class/nvme-subsystem"
SYS_TTY_CONSOLE = "/sys/class/tty/console/active"
SYS_FIRMWARE_ACPI_TABLES = "/sys/firmware/acpi/tables"
SYS_LOCKDOWN = "/sys/kernel/security/lockdown"
PROC = "/proc"
PROC_CMDLINE = "/proc/cmdline"
PROC_MODULES = "/proc/modules"
PROC_MOUNTINFO = "/proc/self/mountinfo"
PROC_SWAPS = "/proc/swaps"
PROC_IOMEM = "/proc/iomem"
PROC_NVIDIA = "/proc/driver/nvidia/gpus"
PROC_BOOT_ID = "/proc/sys/kernel/random/boot_id"
PROC_OSRELEASE = "/proc/sys/kernel/osrelease"
PROC_ROUTE = "/proc/net/route"
PROC_PPPOE = "/proc/net/pppoe"
PROC_ROUTE6 = "/proc/net/ipv6_route"
DEV = "/dev"
DEV_VFIO = "/dev/vfio"
DEV_IOMMU = "/dev/iommu"
DEV_VDUSE = "/dev/vduse"
DEV_SHM = "/dev/shm"
# Not files of the kernel's: what a live host tells only through netlink, other processes' tables
# or a probe. Reading one observes it (host_scan.py, which gives each format); a snapshot keeps the
# text under the same name.
OBSERVED = "/proc/vfiotool/"
NET_ADDRESSES = OBSERVED + "addresses"
NET_KINDS = OBSERVED + "net-kinds"
NET_NAMESPACES = OBSERVED + "net-namespaces"
NET_CALLER = OBSERVED + "caller"
OPEN_NODES = OBSERVED + "open-nodes"
MOUNTS = OBSERVED + "mounts"
BLOCK_CLAIM = OBSERVED + "block-claim"
OTHER_TOOLS = OBSERVED + "other-tools"
ESWITCH = OBSERVED + "eswitch"

READ_DEADLINE_S = 2.0
WRITE_DEADLINE_S = 30.0
_READ_BYTES = 1 << 16
_HOPS = 40


class Tree(Protocol):
    """What a `Host` stands on. Paths are absolute (`"/sys/…"`); failures are `OSError`."""

    def read(self, path: str) -> bytes: ...
    def listdir(self, path: str) -> list[str]: ...
    def readlink(self, path: str) -> str: ...
    def exists(self, path: str) -> bool: ...
    def isdir(self, path: str) -> bool: ...
    def write(self, path: str, data: bytes, timeout_s: float) -> None: ...
    def load_module(self, name: str, timeout_s: float) -> None: ...


class OsTree:
    """A directory laid out like `/`; with `root=""` the machine itself."""

    def __init__(self, root: str = "") -> None:
        self.root = root.rstrip("/")
        self.live = not self.root
        self._child: DoorChild | None = None

    def read(self, path: str) -> bytes:
        if path.startswith(OBSERVED) and (self.live or path == OTHER_TOOLS):
            from vfiotool.host_scan import observe

            return observe(path, self.root)
        descriptor = os.open(self.root + path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.read(descriptor, _READ_BYTES)
            if len(data) < 4096:
                return data
            parts = [data]
            while data := os.read(descriptor, _READ_BYTES):
                parts.append(data)
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(self.root + path)

    def readlink(self, path: str) -> str:
        return os.readlink(self.root + path)

    def exists(self, path: str) -> bool:
        return os.path.exists(self.root + path)

    def isdir(self, path: str) -> bool:
        return os.path.isdir(self.root + path)

    def write(self, path: str, data: bytes, timeout_s: float) -> None:
        self.child().write(path, data, timeout_s)

    def load_module(self, name: str, timeout_s: float) -> None:
        if not self.live:
            raise read_only_root(self.root)
        from vfiotool.host_child import run_modprobe

        run_modprobe(name, timeout_s)

    def netlink(self, request: Request, timeout_s: float) -> list[Message]:
        if not self.live:
            raise read_only_root(self.root)
        from vfiotool.host_netlink import send_in_child

        return send_in_child(request, timeout_s)

    def child(self) -> DoorChild:
        """The child that writes for this process: made when first needed, again after a hang."""
        if not self.live:
            raise read_only_root(self.root)
        if self._child is not None and not self._child.usable():
            self._child.close()
            self._child = None
        if self._child is None:
            from vfiotool.host_child import DoorChild

            self._child = DoorChild()
        return self._child


def follow_links(
    path: str, target_of: Callable[[str], str | None], *, follow_last: bool = True
) -> str:
    """The path without links; `target_of` gives a link's target, or None for what is no link.

    Raises OSError (ELOOP) after 40 links, as the kernel does.
    """
    pending = [part for part in reversed(path.split("/")) if part]
    done = ""
    hops = 0
    while pending:
        part = pending.pop()
        if part == ".":
            continue
        if part == "..":
            done = done.rpartition("/")[0]
            continue
        step = f"{done}/{part}"
        target = target_of(step) if pending or follow_last else None
        if target is None:
            done = step
            continue
        hops += 1
        if hops > _HOPS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.startswith("/"):
            done = ""
        pending.extend(piece for piece in reversed(target.split("/")) if piece)
    return done or "/"


class MemoryTree:
    """A tree held in memory: files, symbolic links, unreadable files; directories are implied.

    `files` maps a path to its bytes, or to an errno where reading it fails; `links` maps a path
    to its target as `readlink` gives it. Links are followed inside the tree and nowhere else, so
    a hostile snapshot cannot make a reader leave it.
    """

    def __init__(
        self,
        files: Mapping[str, bytes | int],
        links: Mapping[str, str],
        directories: Iterable[str] = (),
        *,
        name: str = "snapshot",
    ) -> None:
        self.name = name
        self.files = dict(files)
        self.links = dict(links)
        self.children: dict[str, set[str]] = {"/": set()}
        for path in (*self.files, *self.links):
            self._adopt(path)
        for path in directories:
            self._adopt(path)
            self.children.setdefault(path, set())

    def _adopt(self, path: str) -> None:
        while path != "/":
            parent, _, name = path.rpartition("/")
            parent = parent or "/"
            siblings = self.children.setdefault(parent, set())
            if name in siblings:
                return
            siblings.add(name)
            path = parent

    def resolve(self, path: str, *, follow_last: bool = True) -> str:
        """The path with its symbolic links followed, as the kernel would."""
        return follow_links(path, self.links.get, follow_last=follow_last)

    def read(self, path: str) -> bytes:
        content = self.files.get(path)
        if content is None:
            real = self.resolve(path)
            content = self.files.get(real)
            if content is None:
                number = errno.EISDIR if real in self.children else errno.ENOENT
                raise OSError(number, os.strerror(number), path)
        if isinstance(content, int):
            raise OSError(content, os.strerror(content), path)
        return content

    def listdir(self, path: str) -> list[str]:
        names = self.children.get(self.resolve(path))
        if names is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return list(names)

    def readlink(self, path: str) -> str:
        target = self.links.get(path)
        if target is None:
            target = self.links.get(self.resolve(path, follow_last=False))
        if target is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return target

    def exists(self, path: str) -> bool:
        try:
            real = self.resolve(path)
        except OSError:
            return False
        return real in self.files or real in self.children

    def isdir(self, path: str) -> bool:
        try:
            return self.resolve(path) in self.children
        except OSError:
            return False

    def write(self, path: str, data: bytes, timeout_s: float) -> None:
        raise read_only_root(self.name)

    def load_module(self, name: str, timeout_s: float) -> None:
        raise read_only_root(self.name)


class Host:
    """One host's `/sys`, `/proc`, `/dev`, read through `tree`.

    `live` tells whether this is the running machine: only there are writes, netlink and device
    nodes to be had. The readers that return None do so for absent and for unreadable files alike;
    `read_bytes` tells them apart by its `OSError`.
    """

    def __init__(self, tree: Tree, *, live: bool, name: str) -> None:
        self.tree = tree
        self.live = live
        self.name = name

    @classmethod
    def local(cls) -> Host:
        """The machine that this process runs on."""
        return cls(OsTree(), live=True, name="this host")

    @classmethod
    def at(cls, root: str) -> Host:
        """A directory laid out like `/`, for reading. Raises UsageError if it holds no `sys/`."""
        if os.path.realpath(root) == "/":
            return cls.local()
        if not os.path.isdir(os.path.join(root, "sys")):
            raise UsageError(
                f"{root} is not a root: it holds no sys/ directory",
                hint="give a directory laid out like /, or a file made by: vfiotool snapshot FILE",
            )
        return cls(OsTree(os.path.abspath(root)), live=False, name=root)

    def read_bytes(self, path: str) -> bytes:
        """The file's content. Raises OSError as the kernel does."""
        return self.tree.read(path)

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """At most `length` bytes of a file from `offset` on. Raises OSError as the kernel does.

        For configuration space, each word of which the device itself is asked for.
        """
        if not isinstance(self.tree, OsTree):
            return self.tree.read(path)[offset : offset + length]
        descriptor = os.open(self.tree.root + path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def read(self, path: str) -> str | None:
        """The file's text without surrounding white space, or None if absent or unreadable.

        Bytes that are not UTF-8 appear as ``\\xNN``; control characters are kept (whoever prints
        escapes them).
        """
        try:
            return self.tree.read(path).decode("utf-8", "backslashreplace").strip()
        except OSError:
            return None

    def read_int(self, path: str) -> int | None:
        """The file as a number (decimal, or hexadecimal with 0x), or None if it is not one."""
        text = self.read(path)
        try:
            return None if text is None else int(text, 0)
        except ValueError:
            return None

    def listdir(self, path: str) -> list[str]:
        """The names in a directory, sorted; empty if there is no such directory."""
        try:
            return sorted(self.tree.listdir(path))
        except OSError:
            return []

    def readlink(self, path: str) -> str | None:
        """The target of a symbolic link as it is written, or None."""
        try:
            return self.tree.readlink(path)
        except OSError:
            return None

    def linkname(self, path: str) -> str | None:
        """The last component of a symbolic link's target (`driver` -> `"nvme"`), or None."""
        target = self.readlink(path)
        return None if target is None else target.rpartition("/")[2]

    def realpath(self, path: str) -> str | None:
        """The path below `/sys` that a one-link path such as a bus entry leads to, or None.

        Text only: sysfs's links are relative and lead to real directories, so no further link has
        to be followed (Documentation/admin-guide/sysfs-rules.rst).
        """
        target = self.readlink(path)
        if target is None:
            return path if self.exists(path) else None
        return os.path.normpath(os.path.join(os.path.dirname(path), target))

    def exists(self, path: str) -> bool:
        return self.tree.exists(path)

    def isdir(self, path: str) -> bool:
        return self.tree.isdir(path)

    def read_guarded(
        self, paths: Iterable[str], timeout_s: float = READ_DEADLINE_S
    ) -> dict[str, str | None]:
        """Read files whose reading can block on a device lock (`sriov_numvfs` on some kernels).

        Returns each path's text, or None where it is absent, unreadable or did not answer within
        `timeout_s`; the files after one that hangs are still read.
        """
        found: dict[str, str | None] = {}
        for path in paths:
            try:
                found[path] = self.read_locked(path, timeout_s)
            except Stuck:
                found[path] = None
        return found

    def read_locked(self, path: str, timeout_s: float = READ_DEADLINE_S) -> str | None:
        """Read one file as `read_guarded` does, but tell absence from silence.

        Returns None where it is absent or unreadable; raises Stuck where it did not answer within
        `timeout_s`. Asking afterwards whether the file is there would not tell the two apart: a
        VF can vanish before the one question and be back before the other.
        """
        if not isinstance(self.tree, OsTree) or not self.tree.live:
            return self.read(path)
        try:
            data = self.tree.child().read(path, timeout_s)
        except OSError:
            return None
        return data.decode("utf-8", "backslashreplace").strip()

    def write(self, path: str, data: str, timeout_s: float = WRITE_DEADLINE_S) -> None:
        """Write `data` to one attribute in one `write(2)`: the only way vfiotool changes a host.

        Raises UsageError on a root that is not the running machine, KernelError or NotPermitted
        with the kernel's errno, and Stuck when the write has not returned after `timeout_s`
        seconds (it then goes on in a child that nobody waits for).
        """
        try:
            self.tree.write(path, data.encode(), timeout_s)
        except OSError as error:
            raise from_oserror(f"write {data.strip()!r} to {path}", error) from error

    def writer_pid(self) -> int | None:
        """The process that the next `write` runs in, so that a journal can name it beforehand."""
        return self.tree.child().pid if isinstance(self.tree, OsTree) else None

    def load_module(self, name: str, timeout_s: float = WRITE_DEADLINE_S) -> None:
        """Have modprobe load a module. Raises KernelError, NotPermitted or Stuck as `write` does.

        Loading what is loaded or built in already is no error.
        """
        try:
            self.tree.load_module(name, timeout_s)
        except OSError as error:
            raise from_oserror(f"load module {name}", error) from error

    def netlink(self, request: Request, timeout_s: float = WRITE_DEADLINE_S) -> list[Message]:
        """Send one netlink request that changes the host: the write door's other half.

        Goes to the tree's `netlink(request, timeout_s)`, which a fake kernel may have. Raises
        UsageError on a root that is not the running machine, KernelError or NotPermitted with the
        kernel's errno and words, and Stuck as `write` does.
        """
        send = getattr(self.tree, "netlink", None)
        if send is None:
            raise read_only_root(self.name)
        answers: list[Message] = send(request, timeout_s)
        return answers

    def boot_id(self) -> str | None:
        return self.read(PROC_BOOT_ID)


def read_only_root(name: str) -> UsageError:
    return UsageError(
        f"{name} is not the running host: nothing can be changed there",
        hint="leave out --root, or look first with --dry-run or: vfiotool plan POLICY",
    )
