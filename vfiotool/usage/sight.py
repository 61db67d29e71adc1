"""What a survey sees of a host, with everything that it could not see.

Absent, unreadable and failed are three things here. What is absent is used by nobody; what could
not be read, or whose observation failed, may be used by anybody, and is remembered.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vfiotool.devices.attached import Attached
from vfiotool.devices.pci import PciFunction
from vfiotool.errors import VfiotoolError, errno_name
from vfiotool.host.host import Host
from vfiotool.host.paths import OBSERVED, OBSERVED_END
from vfiotool.host.tree import Tree

# What the kernel answers for what is not there, or has gone while it was looked at.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESRCH})

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Unseen:
    """What could not be looked at: `what` by a short name, `why` in words."""

    what: str
    why: str


class _NotingTree(Tree):
    """A host's tree for readers that take no failure for an answer: each is noted on the way."""

    def __init__(self, inner: Tree, sight: Sight) -> None:
        self.inner, self.name = inner, inner.name
        self._sight = sight

    def _note(self, path: str, ask: Callable[[str], _Value], *, link: bool = False) -> _Value:
        try:
            return ask(path)
        except OSError as error:
            if not _is_absent(error.errno or 0, link=link):
                self._sight.miss(path, _reason(error))
            raise

    def read(self, path: str) -> bytes:
        return self._note(path, self.inner.read)

    def listdir(self, path: str) -> list[str]:
        return self._note(path, self.inner.listdir)

    def readlink(self, path: str) -> str:
        return self._note(path, self.inner.readlink, link=True)

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        contents, targets = self.inner.read_many(folder, files, links)
        for name, content in zip(files, contents, strict=True):
            if isinstance(content, int) and not _is_absent(content, link=False):
                self._sight.miss(f"{folder}/{name}", reason_of(content))
        for name, target in zip(links, targets, strict=True):
            if isinstance(target, int) and not _is_absent(target, link=True):
                self._sight.miss(f"{folder}/{name}", reason_of(target))
        return contents, targets

    def exists(self, path: str) -> bool:
        return self.inner.exists(path)

    def isdir(self, path: str) -> bool:
        return self.inner.isdir(path)

    def read_at(self, path: str, offset: int, length: int, timeout_s: float | None) -> bytes:
        return self.inner.read_at(path, offset, length, timeout_s)

    def read_locked(self, path: str, timeout_s: float) -> bytes:
        return self.inner.read_locked(path, timeout_s)


def _is_absent(number: int, *, link: bool) -> bool:
    # A name that is no link has none (readlink(2), EINVAL).
    return number in _ABSENT or (link and number == errno.EINVAL)


def _reason(error: OSError) -> str:
    return reason_of(error.errno or 0)


def reason_of(number: int) -> str:
    """An errno in words."""
    return f"{os.strerror(number)} ({errno_name(number)})"


class Sight:
    """One look at a host: each thing is read once, so all answers are of one moment.

    The readers answer as those of `Host`. `noted` runs one part of a survey and tells what it
    could not see, whether it was this part or an earlier one that asked first.
    """

    def __init__(self, host: Host, functions: Mapping[str, PciFunction] | None = None) -> None:
        """`functions` were read already, by address."""
        self._host = host
        self.functions = functions or {}
        # For the readers of devices: what they cannot read is noted too.
        self.host = Host(_NotingTree(host.tree, self), live=host.live, name=host.name)
        self.attached = Attached(self)
        self._known: dict[tuple[str, str], tuple[object, Unseen | None]] = {}
        self._unseen: dict[Unseen, None] = {}
        self._values: dict[object, tuple[object, tuple[Unseen, ...]]] = {}

    def noted(self, look: Callable[[], _Value]) -> tuple[_Value, tuple[Unseen, ...]]:
        """What `look` gives, and what could not be seen on the way."""
        before, self._unseen = self._unseen, {}
        try:
            return look(), tuple(self._unseen)
        finally:
            self._unseen = {**before, **self._unseen}

    def once(self, key: object, look: Callable[[Sight], _Value]) -> _Value:
        """What `look` gives for `key`, looked up once; what it could not see is noted each time."""
        if key not in self._values:
            value, unseen = self.noted(lambda: look(self))
            self._values[key] = (value, unseen)
            return value
        known, unseen = self._values[key]
        if unseen:
            self._unseen.update(dict.fromkeys(unseen))
        return known  # type: ignore[return-value]

    def miss(self, what: str, why: str) -> None:
        """Note that something could not be seen."""
        self._unseen[Unseen(what, why)] = None

    def read(self, path: str) -> str | None:
        """The file's text without surrounding white space; None if absent or, noted, unread."""
        return self._ask("read", path, self._text)

    def _text(self, path: str) -> str:
        return self._host.read_bytes(path).decode("utf-8", "backslashreplace").strip()

    def read_int(self, path: str) -> int | None:
        """The file as a number, or None if it is not one."""
        text = self.read(path)
        try:
            return None if text is None else int(text, 0)
        except ValueError:
            return None

    def listdir(self, path: str) -> list[str]:
        """The names in a folder, sorted; empty if absent or, noted, unread."""
        found: list[str] | None = self._ask(
            "listdir", path, lambda name: sorted(self._host.tree.listdir(name))
        )
        return found or []

    def readlink(self, path: str) -> str | None:
        """The target of a symbolic link as it is written, or None."""
        return self._ask("readlink", path, self._host.tree.readlink)

    def linkname(self, path: str) -> str | None:
        """The last component of a symbolic link's target, or None."""
        target = self.readlink(path)
        return None if target is None else target.rpartition("/")[2]

    def realpath(self, path: str) -> str | None:
        """As `Host.realpath`."""
        target = self.readlink(path)
        if target is None:
            return path if self._host.exists(path) else None
        return os.path.normpath(os.path.join(os.path.dirname(path), target))

    def exists(self, path: str) -> bool:
        return self._host.exists(path)

    def isdir(self, path: str) -> bool:
        return self._host.isdir(path)

    def observed(self, name: str) -> list[list[str]]:
        """An observation's lines, split at tabs. What it says it could not see is noted.

        So is one that failed, and one that is not there on a running host or was cut short.
        """
        return self.once(("observed", name), lambda sight: sight._observe(name))

    def _observe(self, name: str) -> list[list[str]]:
        what = name.removeprefix(OBSERVED)
        text = self.read(name)
        if text is None:
            if self._host.live:
                self.miss(what, "it could not be observed")
            return []
        lines = []
        ended = not self._host.live
        for line in text.splitlines():
            fields = line.split("\t")
            if line == OBSERVED_END:
                ended = True
            elif fields[0] == "!":
                self.miss(what, " ".join(fields[1:]))
            else:
                lines.append(fields)
        if not ended:
            self.miss(what, "the observation was cut short")
        return lines

    def _ask(self, kind: str, path: str, ask: Callable[[str], _Value]) -> _Value | None:
        key = (kind, path)
        if key not in self._known:
            self._known[key] = self._try(kind, path, ask)
        value, unseen = self._known[key]
        if unseen is not None:
            self._unseen[unseen] = None
        return value  # type: ignore[return-value]

    def _try(
        self, kind: str, path: str, ask: Callable[[str], _Value]
    ) -> tuple[_Value | None, Unseen | None]:
        what = path.removeprefix(OBSERVED)
        try:
            return ask(path), None
        except OSError as error:
            if _is_absent(error.errno or 0, link=kind == "readlink"):
                return None, None
            return None, Unseen(what, _reason(error))
        except (VfiotoolError, MemoryError) as error:
            return None, Unseen(what, str(error) or "out of memory")
