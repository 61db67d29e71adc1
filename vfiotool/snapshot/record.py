"""A tree that remembers what was read from it: the mechanism behind `vfiotool snapshot`.

Whatever a command reads while it runs on a `RecordingHost` is in the snapshot afterwards, with
the answers that it got. So the command gives the same from the snapshot, by construction.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from vfiotool.host.host import READ_DEADLINE_S, Host
from vfiotool.host.paths import DEV, PROC
from vfiotool.host.tree import Tree, follow_links
from vfiotool.snapshot.text import MAX_FILE_BYTES, NOT_CAPTURED

# Links that mean another file to each process: recorded as if they were directories.
_OPAQUE = frozenset({f"{PROC}/self", f"{PROC}/net", f"{PROC}/thread-self"})


class RecordingTree(Tree):
    """Passes every question on to `inner` and keeps the answer, under the path without links.

    What was answered once is answered the same again, so that all commands see one host.
    """

    def __init__(self, inner: Tree) -> None:
        self.inner = inner
        self.files: dict[str, bytes | int] = {}
        self.links: dict[str, str] = {}
        self.directories: set[str] = set()
        self._known: dict[str, str | None] = {}
        self._names: dict[str, list[str]] = {}
        self._folders: dict[str, str] = {}

    def real(self, path: str, *, follow_last: bool = True) -> str:
        """The path with its links followed; each link on the way is recorded."""
        folder, _, name = path.rpartition("/")
        if name in ("", ".", ".."):
            return follow_links(path, self._link, follow_last=follow_last)
        base = self._folders.get(folder)
        if base is None:
            base = self._folders[folder] = follow_links(folder, self._link).rstrip("/")
        step = f"{base}/{name}"
        if not follow_last or self._link(step) is None:
            return step
        return follow_links(step, self._link)

    def _link(self, path: str) -> str | None:
        """The target if `path` is a link; remembered, since directories are passed often."""
        if path in _OPAQUE:
            return None
        if path in self._known:
            return self._known[path]
        target: str | None
        try:
            target = self.inner.readlink(path)
        except OSError:
            target = None
        self._known[path] = target
        if target is not None:
            self.links[path] = target
        return target

    def read(self, path: str) -> bytes:
        real = self.real(path)
        content = self.files.get(real)
        if content is None or content == NOT_CAPTURED:
            content = self._read(path)
            if content not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                self.files[real] = content
        if isinstance(content, int):
            raise OSError(content, os.strerror(content), path)
        return content

    def _read(self, path: str) -> bytes | int:
        try:
            data = self.inner.read(path)
        except OSError as error:
            return error.errno or errno.EIO
        return data if len(data) <= MAX_FILE_BYTES else errno.EFBIG

    def listdir(self, path: str) -> list[str]:
        real = self.real(path)
        if real not in self._names:
            self._names[real] = self.inner.listdir(path)
            self.directories.add(real)
            # Other people's processes and nodes are no part of the answer.
            if real not in (PROC, DEV):
                for name in self._names[real]:
                    self.note(f"{real}/{name}" if real != "/" else f"/{name}")
        return list(self._names[real])

    def note(self, path: str) -> None:
        """Record that there is something at `path`, without its content."""
        if path in self.files or self._link(path) is not None:
            return
        if self.inner.isdir(path):
            self.directories.add(path)
        else:
            self.files[path] = NOT_CAPTURED

    def readlink(self, path: str) -> str:
        real = self.real(path, follow_last=False)
        target = self._link(real)
        if target is None:
            # Asked again only for its errno.
            target = self.inner.readlink(path)
        self.note_target(real)
        return target

    def note_target(self, link: str) -> None:
        """Record that a link leads somewhere, where it does."""
        try:
            real = self.real(link)
        except OSError:
            return
        if self.inner.exists(real):
            self.note(real)

    def exists(self, path: str) -> bool:
        found = self.inner.exists(path)
        if found:
            self.note(self.real(path))
        return found

    def isdir(self, path: str) -> bool:
        found = self.inner.isdir(path)
        if found or self.inner.exists(path):
            self.note(self.real(path))
        return found

    def write_attribute(self, path: str, data: bytes, timeout_s: float) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def load_module(self, name: str, timeout_s: float) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)


class RecordingHost(Host):
    """A host whose readings are kept in `recording`."""

    def __init__(self, inner: Host) -> None:
        self.recording = RecordingTree(inner.tree)
        self.inner = inner
        super().__init__(self.recording, live=inner.live, name=inner.name)

    def read_guarded(
        self, paths: Iterable[str], timeout_s: float = READ_DEADLINE_S
    ) -> dict[str, str | None]:
        wanted = list(paths)
        known = self.recording.files
        asked = [
            path
            for path in wanted
            if known.get(self.recording.real(path), NOT_CAPTURED) == NOT_CAPTURED
        ]
        for path, text in self.inner.read_guarded(asked, timeout_s).items():
            real = self.recording.real(path)
            if text is not None:
                self.recording.files[real] = text.encode() + b"\n"
            elif self.inner.exists(path):
                self.recording.files[real] = errno.ETIMEDOUT
        # What is not known now is absent or hangs: it must not be read again.
        return {
            path: self.read(path)
            if isinstance(known.get(self.recording.real(path)), bytes)
            else None
            for path in wanted
        }
