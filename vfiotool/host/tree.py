"""What a `Host` stands on: the live machine, a directory laid out like `/`, or a tree in memory."""

from __future__ import annotations

import errno
import os

from vfiotool.errors import UsageError
from vfiotool.host.paths import DEV, OBSERVED, OTHER_TOOLS

# Importing these would take a third of the time that `groups` takes to list a small host.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeVar

    from vfiotool.host.child import WriterProcess
    from vfiotool.netlink.codec import Message, Request

    _Names = tuple[str, ...]
    _ReadFolder = Callable[[str, _Names, _Names], tuple[list[bytes | int], list[str | int]]]
    _Answer = TypeVar("_Answer")

_READ_BYTES = 1 << 16
_HOPS = 40
# Said thousands of times of a tree in memory.
_ABSENT = os.strerror(errno.ENOENT)


class Tree:
    """What a `Host` stands on. Paths are absolute (`"/sys/…"`); failures are `OSError`.

    What a tree that cannot be changed answers is given here; so is what follows from the rest.
    """

    # What stands in an error for the tree, and the directory that it is, if it is one.
    name = "this root"
    root: str | None = None
    # Whether its disks can be claimed.
    claims_disks = False
    # Whether it can be asked over netlink.
    answers_netlink = False

    def read(self, path: str) -> bytes:
        """The file's whole content."""
        raise NotImplementedError

    def listdir(self, path: str) -> list[str]:
        """The names in a directory, in no order."""
        raise NotImplementedError

    def readlink(self, path: str) -> str:
        """A symbolic link's target as it is written."""
        raise NotImplementedError

    def exists(self, path: str) -> bool:
        raise NotImplementedError

    def isdir(self, path: str) -> bool:
        raise NotImplementedError

    def read_at(self, path: str, offset: int, length: int, timeout_s: float | None) -> bytes:
        """At most `length` bytes of a file from `offset` on. Raises Stuck after `timeout_s`."""
        return self.read(path)[offset : offset + length]

    def read_locked(self, path: str, timeout_s: float) -> bytes:
        """A file whose reading may wait for a device's lock. Raises Stuck after `timeout_s`."""
        return self.read(path)

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        """What several files of a folder hold, and where links of it lead, in the order of the
        names.

        The errno stands in the place of what failed; no OSError is raised.
        """
        contents = [_or_errno(self.read, f"{folder}/{name}") for name in files]
        return contents, [_or_errno(self.readlink, f"{folder}/{name}") for name in links]

    def writer_pid(self) -> int | None:
        """The process that the next write runs in, where writes have one of their own."""
        return None

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        raise read_only_root(self.name)

    def write_claiming(
        self, path: str, data: bytes, timeout_s: float, disks: tuple[str, ...]
    ) -> bool:
        """`write_attribute` while the block devices `disks` (`nvme0n1`) are claimed; False, and
        nothing is written, if somebody has one. Only where `claims_disks`."""
        raise read_only_root(self.name)

    def load_module(self, name: str, timeout_s: float) -> None:
        raise read_only_root(self.name)

    def ask_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        raise read_only_root(self.name)

    def send_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        raise read_only_root(self.name)


def _or_errno(ask: Callable[[str], _Answer], path: str) -> _Answer | int:
    try:
        return ask(path)
    except OSError as error:
        return error.errno or errno.EIO


class OsTree(Tree):
    """A directory laid out like `/`; with `root=""` the machine itself."""

    def __init__(self, root: str = "") -> None:
        self.root: str = root.rstrip("/")
        self.live = not self.root
        self.name = self.root or "this host"
        self.answers_netlink = self.live
        self._child: WriterProcess | None = None
        # Imported when it is needed: a C extension takes time to load.
        self._read_folder: _ReadFolder | None = None

    def read(self, path: str) -> bytes:
        if path.startswith(OBSERVED) and (self.live or path == OTHER_TOOLS):
            from vfiotool.host.observe import observe

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

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        if self._read_folder is None:
            from vfiotool.native.folder import read_folder

            self._read_folder = read_folder
        return self._read_folder(self.root + folder, files, links)

    def readlink(self, path: str) -> str:
        return os.readlink(self.root + path)

    def exists(self, path: str) -> bool:
        return os.path.exists(self.root + path)

    def isdir(self, path: str) -> bool:
        return os.path.isdir(self.root + path)

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        self.child().write_attribute(path, data, timeout_s)

    @property
    def claims_disks(self) -> bool:  # type: ignore[override]
        return self.live

    def write_claiming(
        self, path: str, data: bytes, timeout_s: float, disks: tuple[str, ...]
    ) -> bool:
        nodes = tuple(f"{DEV}/{name.replace('!', '/')}" for name in disks)
        return self.child().write_attribute(path, data, timeout_s, nodes)

    def load_module(self, name: str, timeout_s: float) -> None:
        if not self.live:
            raise read_only_root(self.root)
        from vfiotool.host.child import run_modprobe

        run_modprobe(name, timeout_s)

    def ask_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        return self.send_netlink(request, timeout_s)

    def send_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        if not self.live:
            raise read_only_root(self.root)
        from vfiotool.host.child import send_in_child

        return send_in_child(request, timeout_s)

    def read_at(self, path: str, offset: int, length: int, timeout_s: float | None) -> bytes:
        if timeout_s is not None and self.live:
            return self.child().read(path, timeout_s, offset, length)
        descriptor = os.open(self.root + path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def read_locked(self, path: str, timeout_s: float) -> bytes:
        return self.child().read(path, timeout_s) if self.live else self.read(path)

    def writer_pid(self) -> int | None:
        return self.child().pid

    def child(self) -> WriterProcess:
        """The child that writes for this process: made when first needed, again after a hang."""
        if not self.live:
            raise read_only_root(self.root)
        if self._child is not None and not self._child.usable():
            self._child.close()
            self._child = None
        if self._child is None:
            from vfiotool.host.child import WriterProcess

            self._child = WriterProcess()
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


class MemoryTree(Tree):
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
                if real in self.children:
                    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
                raise OSError(errno.ENOENT, _ABSENT, path)
        if isinstance(content, int):
            raise OSError(content, os.strerror(content), path)
        return content

    def listdir(self, path: str) -> list[str]:
        names = self.children.get(self.resolve(path))
        if names is None:
            raise OSError(errno.ENOENT, _ABSENT, path)
        return list(names)

    def readlink(self, path: str) -> str:
        target = self.links.get(path)
        if target is None:
            target = self.links.get(self.resolve(path, follow_last=False))
        if target is None:
            raise OSError(errno.ENOENT, _ABSENT, path)
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


def read_only_root(name: str) -> UsageError:
    return UsageError(
        f"{name} is not the running host: nothing can be changed there",
        hint="leave out --root, or look first with --dry-run or: vfiotool plan POLICY",
    )
