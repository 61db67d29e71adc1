"""The only way to the host: `/sys`, `/proc`, `/dev`, and the kernel's address tables.

A `Host` reads from a tree (`tree.py`): the machine itself, a directory laid out like `/` that
stands for another machine, or a `MemoryTree` that holds a snapshot or a test's fake kernel.
Everything above this package takes a `Host` and cannot tell them apart.

Writing goes through `Host.write_attribute` alone. On a live host each write runs in a disposable
child with a deadline, because unbind, remove, reset and a change of VFs block for as long as a
user holds the device (Documentation/driver-api/vfio.rst, "release" of a device in use).
"""

from __future__ import annotations

import os

from vfiotool.errors import Stuck, UsageError, from_oserror
from vfiotool.host.clock import Clock
from vfiotool.host.paths import PROC_BOOT_ID
from vfiotool.host.tree import OsTree, Tree

# Importing these would take a third of the time that `groups` takes to list a small host.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiotool.netlink.codec import Message, Request

READ_DEADLINE_S = 2.0
WRITE_DEADLINE_S = 30.0


class Host:
    """One host's `/sys`, `/proc`, `/dev`, read through `tree`.

    `live` tells whether this is the running machine: only there are writes, netlink and device
    nodes to be had. Waits for its kernel are measured by `clock`. The readers that return None do
    so for absent and for unreadable files alike; `read_bytes` tells them apart by its `OSError`.
    """

    def __init__(self, tree: Tree, *, live: bool, name: str, clock: Clock | None = None) -> None:
        self.tree = tree
        self.live = live
        self.name = name
        self.clock = clock or Clock()

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

    def read_at(self, path: str, offset: int, length: int, timeout_s: float | None = None) -> bytes:
        """At most `length` bytes of a file from `offset` on. Raises OSError as the kernel does.

        For configuration space, each word of which the device itself is asked for. The kernel keeps
        its readers waiting while the device is reset (drivers/pci/access.c, pci_wait_cfg): with
        `timeout_s`, Stuck is raised after that time.
        """
        return self.tree.read_at(path, offset, length, timeout_s)

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

    def realpaths(self, folder: str, names: Iterable[str]) -> dict[str, str]:
        """`realpath` of many names of one folder, without those that are not there."""
        names = tuple(names)
        found: dict[str, str] = {}
        for name, target in zip(names, self.tree.read_many(folder, (), names)[1], strict=True):
            if isinstance(target, int):
                path = self.realpath(f"{folder}/{name}")
            else:
                path = os.path.normpath(f"{folder}/{target}")
            if path is not None:
                found[name] = path
        return found

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
        try:
            data = self.tree.read_locked(path, timeout_s)
        except OSError:
            return None
        return data.decode("utf-8", "backslashreplace").strip()

    def write_attribute(self, path: str, data: str, timeout_s: float = WRITE_DEADLINE_S) -> None:
        """Write `data` to one attribute in one `write(2)`: the only way vfiotool changes a host.

        Raises UsageError on a root that is not the running machine, KernelError or NotPermitted
        with the kernel's errno, and Stuck when the write has not returned after `timeout_s`
        seconds (it then goes on in a child that nobody waits for).
        """
        try:
            self.tree.write_attribute(path, data.encode(), timeout_s)
        except OSError as error:
            raise from_oserror(f"write {data.strip()!r} to {path}", error) from error

    def write_claiming(
        self,
        path: str,
        data: str,
        disks: tuple[str, ...],
        timeout_s: float = WRITE_DEADLINE_S,
    ) -> bool:
        """`write_attribute`, during which nobody can come to mount `disks` (`nvme0n1`), swap to
        them or build on them: they are claimed, as mkfs does.

        False, and nothing is written, if somebody has one claimed. Raises as `write_attribute`.
        """
        if not disks or not self.tree.claims_disks:
            self.write_attribute(path, data, timeout_s)
            return True
        try:
            return self.tree.write_claiming(path, data.encode(), timeout_s, disks)
        except OSError as error:
            raise from_oserror(f"write {data.strip()!r} to {path}", error) from error

    def writer_pid(self) -> int | None:
        """The process that the next write runs in, so that a journal can name it beforehand."""
        return self.tree.writer_pid()

    def load_module(self, name: str, timeout_s: float = WRITE_DEADLINE_S) -> None:
        """Have modprobe load a module. Raises as `write_attribute` does.

        Loading what is loaded or built in already is no error.
        """
        try:
            self.tree.load_module(name, timeout_s)
        except OSError as error:
            raise from_oserror(f"load module {name}", error) from error

    def ask_netlink(self, request: Request, timeout_s: float = READ_DEADLINE_S) -> list[Message]:
        """Send one netlink request that changes nothing. Raises as `send_netlink` does."""
        return self.tree.ask_netlink(request, timeout_s)

    def send_netlink(self, request: Request, timeout_s: float = WRITE_DEADLINE_S) -> list[Message]:
        """Send one netlink request that changes the host.

        Goes to the tree's method of that name, which a fake kernel may have. Raises UsageError on
        a root that is not the running machine, KernelError or NotPermitted with the kernel's errno
        and words, and Stuck as `write_attribute` does.
        """
        return self.tree.send_netlink(request, timeout_s)

    def boot_id(self) -> str | None:
        return self.read(PROC_BOOT_ID)
