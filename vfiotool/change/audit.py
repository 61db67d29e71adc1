"""The audit trail: every change with who made it, in the system's log and in a file that lasts.

The journal below `/run` is for recovery: root's alone, and gone with the boot. Here a change leaves
two lines, one before its first write and one with its outcome, on the medium when the call returns;
a change without a second line was cut off. Everybody may read the file. The same goes to journald,
or to syslog where there is none (systemd: native journal protocol; syslog(3)).

Nothing of this can fail a change: what cannot be written to the one place is still in the other.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vfiotool.change.sealed import seal, unseal
from vfiotool.host.paths import DEV_LOG, PROC

LOG_FOLDER = "/var/log/vfiotool"
FILE = "changes.log"
_JOURNALD = "/run/systemd/journal/socket"
# The file is put aside as FILE.1 once it is so large: some ten thousand changes.
_LARGEST_BYTES = 8 << 20
# syslog(3): LOG_DAEMON, LOG_NOTICE and LOG_WARNING.
_NOTICE, _WARNING = 3 << 3 | 5, 3 << 3 | 4
_UNSET_UID = 0xFFFFFFFF
# The year 9000: what is later can be shown in no time zone.
_LATEST = 221_845_392_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Who changes something: the user that runs it, who logged in (`loginuid`, which sudo and su
    do not change), and whom sudo names."""

    uid: int
    user: str
    login: str | None
    sudo: str | None

    @property
    def words(self) -> str:
        """`anna through sudo as root`, `root`."""
        person = self.sudo or self.login
        if person is None or person == self.user:
            return self.user
        return f"{person} {'through sudo ' if self.sudo else ''}as {self.user}"


@dataclass(frozen=True, slots=True)
class Audited:
    """One change as the file tells it. `outcome` is None where nothing was written after its
    begin: it is running, stuck, or was cut off with the machine."""

    boot: str
    number: int
    at: float
    title: str
    by: Mapping[str, Any]
    command: tuple[str, ...]
    steps: tuple[Mapping[str, Any], ...]
    undoes: int | None
    outcome: str | None
    error: str | None


def read_caller() -> Caller:
    """Who runs this process."""
    uid = os.getuid()
    login: str | None = None
    with suppress(OSError, ValueError):
        with open(f"{PROC}/self/loginuid", encoding="ascii") as file:
            number = int(file.read())
        login = None if number == _UNSET_UID else _name(number)
    # The environment is root's own here: whoever may change it may do anything else.
    sudo = os.environ.get("SUDO_USER") if uid == 0 else None
    return Caller(uid, _name(uid), login, sudo)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class AuditTrail:
    """Appends to the file in `folder` and to the system's log. Nothing is raised."""

    def __init__(self, boot: str, folder: str = LOG_FOLDER, *, log: bool = True) -> None:
        self.boot = boot
        self.folder = folder
        self._log = log

    def begun(
        self,
        number: int,
        title: str,
        steps: Sequence[Mapping[str, Any]],
        command: Iterable[str],
        undoes: int | None,
    ) -> None:
        """Before the first write of a change."""
        caller = read_caller()
        by = {
            "uid": caller.uid,
            "user": caller.user,
            "login": caller.login,
            "sudo": caller.sudo,
            "pid": os.getpid(),
        }
        entry = {"title": title, "by": by, "command": list(command), "undoes": undoes}
        self._append("begin", number, {**entry, "steps": list(steps)})
        text = f"change {number} by {caller.words}: {title} ({len(steps)} steps)"
        self._tell(_NOTICE, text, number, "begun")

    def ended(self, number: int, outcome: str, error: str | None = None) -> None:
        """After its last one: `committed`, `rolled-back` or `stuck`."""
        self._append("end", number, {"outcome": outcome, "error": error})
        text = f"change {number} {outcome}" + (f": {error}" if error else "")
        self._tell(_NOTICE if outcome == "committed" else _WARNING, text, number, outcome)

    def _append(self, kind: str, number: int, values: Mapping[str, Any]) -> None:
        entry = {"t": kind, "at": time.time(), "boot": self.boot, "number": number, **values}
        line = seal(entry)
        with suppress(OSError):
            self._prepare()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(f"{self.folder}/{FILE}", flags, 0o644)
            try:
                # Another's file here is nobody's record: it could be rewritten by its owner.
                found = os.fstat(descriptor)
                if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode):
                    if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":
                        # Cut off with the machine, or by a full disk: it shall not take this one.
                        line = b"\n" + line
                    os.write(descriptor, line)
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _prepare(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self.folder, 0o755)
        path = f"{self.folder}/{FILE}"
        with suppress(FileNotFoundError):
            if os.lstat(path).st_size > _LARGEST_BYTES:
                os.rename(path, f"{path}.1")

    def _tell(self, priority: int, text: str, number: int, outcome: str) -> None:
        if not self._log:
            return
        # One line whatever a name holds: a newline would begin a record of its own.
        plain = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            if os.path.exists(_JOURNALD):
                fields = {
                    "MESSAGE": plain,
                    "PRIORITY": priority & 7,
                    "SYSLOG_IDENTIFIER": "vfiotool",
                    "VFIOTOOL_CHANGE": number,
                    "VFIOTOOL_OUTCOME": outcome,
                }
                data = "".join(f"{key}={value}\n" for key, value in fields.items())
                channel.sendto(data.encode("utf-8", "replace"), _JOURNALD)
            else:
                data = f"<{priority}>vfiotool[{os.getpid()}]: {plain}"
                channel.sendto(data.encode("utf-8", "replace"), DEV_LOG)


def read_audit(since: float = 0.0, folder: str = LOG_FOLDER) -> tuple[Audited, ...]:
    """The changes begun since a time (seconds since 1970), oldest first. Needs no root.

    Lines that are damaged are passed over: what stands around them is still told. Raises
    PermissionError where the folder may not be read; a folder that is not there has no changes.
    """
    found: dict[tuple[str, int], Audited] = {}
    for entry in _entries(folder):
        with suppress(KeyError, TypeError, ValueError):
            key = (str(entry["boot"]), int(entry["number"]))
            if entry["t"] == "begin":
                found[key] = _begun(key, entry)
            elif key in found:
                old = found[key]
                error = None if entry["error"] is None else str(entry["error"])
                ended: dict[str, Any] = {"outcome": str(entry["outcome"]), "error": error}
                found[key] = Audited(**{name: getattr(old, name) for name in _KEPT}, **ended)
    rows = (item for item in found.values() if item.at >= since)
    return tuple(sorted(rows, key=lambda item: item.at))


_KEPT = ("boot", "number", "at", "title", "by", "command", "steps", "undoes")


def _begun(key: tuple[str, int], entry: Mapping[str, Any]) -> Audited:
    """Raises KeyError, TypeError or ValueError for a line that another program has sealed."""
    at = float(entry["at"])
    if not 0 <= at < _LATEST:
        raise ValueError("it is from no time that a clock shows")
    by: dict[str, Any] = dict(entry["by"])
    by |= {"uid": int(by["uid"]), "user": str(by["user"])}
    by |= {name: None if by[name] is None else str(by[name]) for name in ("login", "sudo")}
    return Audited(
        boot=key[0],
        number=key[1],
        at=at,
        title=str(entry["title"]),
        by=by,
        command=tuple(map(str, entry["command"])),
        steps=tuple(dict(step) for step in entry["steps"]),
        undoes=None if entry["undoes"] is None else int(entry["undoes"]),
        outcome=None,
        error=None,
    )


def _entries(folder: str) -> Iterator[dict[str, Any]]:
    for name in (f"{FILE}.1", FILE):
        try:
            with open(f"{folder}/{name}", "rb") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            with suppress(ValueError, json.JSONDecodeError):
                entry = unseal(line)
                if isinstance(entry, dict):
                    yield entry
