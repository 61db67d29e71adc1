"""The journal: every change's intent, recorded before the kernel hears of it.

One file a transaction in `RUN/BOOT-ID/`, sealed lines (`sealed.py`), each synced before the write
that it announces. `NNNNNN.open` is a transaction in progress, locked by the process that works on
it; one that is open and not locked was left by a crash or is stuck, and `recover` takes it up. When
it ends it is renamed to `NNNNNN.done`. A torn last line is what a crash leaves and is ignored: what
it announced has not been done. Anything else that does not read back is damage, and is named.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from vfiotool.change.audit import AuditTrail
from vfiotool.change.folder import Folder, safe_name
from vfiotool.change.locks import held, try_lock
from vfiotool.change.sealed import is_sealed, seal, unseal
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.names import DRIVER, OVERRIDE, require
from vfiotool.change.steps.registry import (
    held_values,
    step_from_json,
    step_to_json,
    steps_as_json,
)
from vfiotool.change.steps.state import Binding, Identity
from vfiotool.errors import KernelError, NotPermitted, Refused, UsageError, from_oserror
from vfiotool.host.host import Host
from vfiotool.host.paths import PROC

RUN_FOLDER = "/run/vfiotool"
KEPT = 1000
# The end of the year 9999, which is as far as a date can be shown.
_LATEST_S = 253_402_300_800
OUTCOMES = ("committed", "rolled-back")
_OPEN, _DONE = ".open", ".done"
_NUMBER = re.compile(r"[0-9]{6,9}", re.ASCII)


@dataclass(frozen=True)
class Record:
    """One transaction as its file tells it.

    `writer` is the process, by id and start time, whose last write was not seen to return.
    `outcome` is `committed`, `rolled-back`, or None while it is open; `stuck` is the message of
    the write that did not return. `started`, `done` and `undone` hold step numbers from 1; `nodes`
    are the device nodes that the last step started with. `interrupted`: it is stuck because its
    user gave it up, so that it is undone.
    """

    number: int
    at: float
    title: str
    pid: int
    keys: tuple[str, ...]
    steps: tuple[Step, ...]
    undoes: int | None
    outcome: str | None
    error: str | None
    stuck: str | None
    undoing: bool
    started: frozenset[int]
    done: frozenset[int]
    undone: frozenset[int]
    writer: tuple[int, str] | None
    nodes: tuple[str, ...]
    interrupted: bool = False


@dataclass
class _Draft:
    head: dict[str, Any]
    outcome: str | None = None
    error: str | None = None
    stuck: str | None = None
    undoing: bool = False
    started: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    undone: set[int] = field(default_factory=set)
    writer: tuple[int, str] | None = None
    nodes: tuple[str, ...] = ()
    interrupted: bool = False


def parse_record(data: bytes) -> Record | None:
    """A transaction from its file's bytes, or None if not even its first line is whole.

    Raises KernelError for a whole line that is no record: that is damage, not a crash.
    """
    *lines, torn = data.split(b"\n")
    draft: _Draft | None = None
    for number, line in enumerate(lines, 1):
        try:
            entry = unseal(line)
            if draft is None:
                draft = _Draft(_checked_head(entry))
            else:
                _take_entry(draft, entry)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(f"line {number}: {error}") from error
    if is_sealed(torn[:-1]):
        # The whole line is there, and only its newline is not.
        raise _damaged(f"line {len(lines) + 1}: it does not end")
    try:
        return None if draft is None else _finish(draft)
    except KernelError as error:
        raise _damaged(f"its first line: {error.message}") from error


def _damaged(where: str) -> KernelError:
    return KernelError(
        f"the journal is damaged at {where}",
        hint="look at the host by hand, then move that file away: history and recover cannot read "
        "it",
    )


def _one_of(value: object, *types: type) -> Any:
    """`value` if it is of one of these types. Raises TypeError."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{str(value)[:40]!r} is out of place")
    return value


def _checked_head(entry: dict[str, Any]) -> dict[str, Any]:
    """The first line, if each of its values is what it has to be. Raises as a parser does."""
    if entry["t"] != "begin":
        raise ValueError(f"{str(entry['t'])[:40]!r} begins no transaction")
    for name in ("number", "pid"):
        _one_of(entry[name], int)
    if not 0 <= _one_of(entry["at"], int, float) < _LATEST_S:
        raise ValueError("its time is none")
    _one_of(entry["title"], str)
    _one_of(entry["undoes"], int, type(None))
    _one_of(entry["steps"], list)
    for key in _one_of(entry["keys"], list):
        try:
            safe_name(_one_of(key, str))
        except UsageError as error:
            raise ValueError(error.message) from error
    return entry


def _take_entry(draft: _Draft, entry: dict[str, Any]) -> None:
    kind = entry["t"]
    if kind == "end":
        if entry["outcome"] not in OUTCOMES:
            raise ValueError(f"{str(entry['outcome'])[:40]!r} is no outcome")
        draft.outcome, draft.error = entry["outcome"], _one_of(entry["error"], str, type(None))
        return
    number = _one_of(entry["n"], int)
    if not 0 <= number <= len(draft.head["steps"]):
        raise ValueError(f"there is no step {number}")
    if kind == "step":
        draft.started.add(number)
        nodes = _one_of(entry.get("nodes", []), list)
        draft.nodes = tuple(_one_of(node, str) for node in nodes)
    elif kind == "done":
        draft.done.add(number)
    elif kind == "undoing":
        draft.undoing = True
    elif kind == "undone":
        draft.undone.add(number)
    elif kind == "write":
        pid, since = _one_of(entry["writer"], int, type(None)), entry["since"]
        draft.writer = (pid, str(since)) if pid else None
    elif kind == "wrote":
        draft.writer = None
    elif kind == "stuck":
        draft.stuck = _one_of(entry["message"], str)
        draft.interrupted = entry.get("interrupted") is True
    elif kind not in ("module", "netlink"):
        raise ValueError(f"{str(kind)[:40]!r} is no entry of a journal")


def _finish(draft: _Draft) -> Record:
    head = draft.head
    return Record(
        number=head["number"],
        at=head["at"],
        title=head["title"],
        pid=head["pid"],
        keys=tuple(head["keys"]),
        steps=tuple(step_from_json(step) for step in head["steps"]),
        undoes=head["undoes"],
        outcome=draft.outcome,
        error=draft.error,
        stuck=draft.stuck,
        undoing=draft.undoing,
        started=frozenset(draft.started),
        done=frozenset(draft.done),
        undone=frozenset(draft.undone),
        writer=draft.writer,
        nodes=draft.nodes,
        interrupted=draft.interrupted,
    )


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a device stood before vfiotool took it away, and the serials that it had there."""

    identity: Identity
    binding: Binding
    serials: tuple[str, ...] = ()


class Transaction:
    """An open journal file, locked by this process. `close` it with its outcome."""

    def __init__(
        self, folder: Folder, number: int, descriptor: int, audit: AuditTrail | None = None
    ) -> None:
        self.number = number
        self._audit = audit
        self._folder = folder
        self._descriptor = descriptor
        self._length = os.fstat(descriptor).st_size

    def note(self, kind: str, **values: object) -> None:
        """Append one entry; it is on the medium when this returns.

        Raises KernelError with nothing appended where there is no room.
        """
        line = seal({"t": kind, **values})
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            # Half a line would swallow the next one.
            os.ftruncate(self._descriptor, self._length)
            raise from_oserror(
                f"write the journal in {self._folder.path}", error, hint="make room there"
            ) from error
        self._length += len(line)
        if kind == "stuck" and self._audit is not None:
            self._audit.ended(self.number, "stuck", str(values.get("message") or "") or None)

    def end(self, outcome: str, error: str | None = None) -> None:
        """Close with `committed` or `rolled-back`. Raises KernelError, and is then still open."""
        self.note("end", outcome=outcome, error=error)
        name = f"{self.number:06d}"
        self._folder.rename(name + _OPEN, name + _DONE)
        self.release()
        if self._audit is not None:
            self._audit.ended(self.number, outcome, error)

    def release(self) -> None:
        """Close it as it is: `recover` will find it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def writer_of(host: Host) -> dict[str, object]:
    """The process that the next write runs in, as a `write` entry names it."""
    pid = host.writer_pid()
    return {"writer": pid, "since": None if pid is None else started_at(host, pid)}


def started_at(host: Host, pid: int) -> str | None:
    """A process's start time in clock ticks, which with its id names it for ever (proc(5))."""
    stat = host.read(f"{PROC}/{pid}/stat")
    return None if stat is None else stat.rpartition(")")[2].split()[19]


class Journal:
    """The journal of one boot of one host, and the locks and origins beside it.

    Raises Refused for a folder that is not safely this user's, NotPermitted without the right to
    make it.
    """

    def __init__(
        self, host: Host, run_folder: str = RUN_FOLDER, audit: AuditTrail | None = None
    ) -> None:
        self.run_folder = run_folder
        boot = host.boot_id() or "unknown"
        # A journal elsewhere is no record of this machine's.
        own = host.live and host.tree.root == "" and run_folder == RUN_FOLDER
        self.audit = AuditTrail(boot) if audit is None and own else audit
        self._root = Folder(run_folder)
        self.locks = self._root.sub("locks")
        self._boot = self._root.sub(f"boot-{boot}")
        self._origins = self._boot.sub("origins")
        self.pending = self._boot.sub("pending")

    @classmethod
    def existing(cls, host: Host, run_folder: str = RUN_FOLDER) -> Journal | None:
        """The journal if there is one that this user may open: a dry run makes none."""
        if not os.path.isdir(run_folder):
            return None
        try:
            return cls(host, run_folder)
        except (NotPermitted, Refused):
            return None

    def begin(
        self, title: str, steps: tuple[Step, ...], keys: Iterable[str], undoes: int | None = None
    ) -> Transaction:
        """A new transaction, recorded with all its steps before the first of them runs."""
        scratch = f"new.{os.getpid()}.{time.monotonic_ns()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        descriptor = self._boot.open(scratch, flags)
        # Locked before it has its name, so that no `recover` mistakes it for an abandoned one.
        try_lock(descriptor)
        try:
            with held(self.locks, ["journal"], 30.0):
                number = self._next_number()
                transaction = Transaction(self._boot, number, descriptor, self.audit)
                transaction.note(
                    "begin",
                    number=number,
                    at=time.time(),
                    title=title,
                    pid=os.getpid(),
                    keys=list(keys),
                    undoes=undoes,
                    steps=[step_to_json(step) for step in steps],
                )
                self._boot.rename(scratch, f"{number:06d}{_OPEN}")
        except BaseException:
            self._boot.remove(scratch)
            os.close(descriptor)
            raise
        if self.audit is not None:
            rows = steps_as_json(steps)
            self.audit.begun(transaction.number, title, rows, sys.argv, undoes)
        return transaction

    def _next_number(self) -> int:
        """One more than the last; of those that ended only the latest are kept."""
        numbers = self._numbers()
        done = [number for number, name in numbers if name.endswith(_DONE)]
        for old in done[:-KEPT]:
            self._boot.remove(f"{old:06d}{_DONE}")
        return max((number for number, _ in numbers), default=0) + 1

    def _numbers(self) -> list[tuple[int, str]]:
        return [
            (int(name[:-5]), name)
            for name in self._boot.names()
            if name.endswith((_OPEN, _DONE)) and _NUMBER.fullmatch(name[:-5])
        ]

    def history(self) -> list[Record]:
        """All transactions of this boot, oldest first."""
        found = []
        for _, name in self._numbers():
            record, _ = self._read(name)
            if record is not None:
                found.append(record)
        return found

    def _read(self, name: str) -> tuple[Record | None, bytes]:
        """A transaction and its file's bytes. Raises KernelError that names a damaged file."""
        data = self._boot.read(name)
        if data is None:
            # It ended while we looked, and has its other name now.
            return None, b""
        try:
            record = parse_record(data)
            if record is None:
                raise _damaged("its first line")
            if record.number != int(name[:-5]):
                raise _damaged(f"its number: {record.number}")
            if name.endswith(_DONE) and record.outcome is None:
                raise _damaged("its end: there is none")
            return record, data
        except KernelError as error:
            text = f"{self._boot.path}/{name}: {error.message}"
            raise KernelError(text, hint=error.hint) from error

    def unfinished(
        self, keys: set[str] | None = None, only: int | None = None
    ) -> list[tuple[Record, Transaction | None]]:
        """The open transactions, each with its file locked, or None while a process works on it.

        With `keys`, those alone that need one of these locks; with `only`, the one of that number.
        The caller `end`s or `release`s those
        that it got.
        """
        found = []
        for number, name in self._numbers():
            if not name.endswith(_OPEN):
                continue
            if only not in (None, number):
                continue
            if keys is not None and not self._touches(name, keys):
                continue
            try:
                descriptor = self._boot.open(name, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue
            locked = try_lock(descriptor)
            try:
                record, data = self._read(name)
            except KernelError:
                os.close(descriptor)
                raise
            if record is None or not locked:
                os.close(descriptor)
            if record is None:
                continue
            if locked:
                _cut_torn_line(descriptor, data)
            transaction = None
            if locked:
                transaction = Transaction(self._boot, number, descriptor, self.audit)
            found.append((record, transaction))
        return found

    def _touches(self, name: str, keys: set[str]) -> bool:
        record, _ = self._read(name)
        return record is not None and bool(keys & set(record.keys))

    def abandoned_on(self, keys: Iterable[str]) -> Record | None:
        """A transaction on one of `keys` that nobody works on; call it with the keys held."""
        wanted = set(keys)
        hit = None
        for record, transaction in self.unfinished(wanted):
            if transaction is not None:
                transaction.release()
                hit = record
        return hit

    def origin(self, bus: str, name: str, identity: Identity) -> Binding | None:
        """The binding that a device had before vfiotool took it away, if it is that device."""
        found = self._read_origin(f"{bus}-{name}")
        return None if found is None or found.identity.differs_from(identity) else found.binding

    def origins(self, bus: str) -> dict[str, Origin]:
        """What is remembered of all devices of a bus that were taken away, by name."""
        files = [file for file in self._origins.names() if file.startswith(f"{bus}-")]
        found = ((file.partition("-")[2], self._read_origin(file)) for file in files)
        return {name: origin for name, origin in found if origin is not None}

    def _read_origin(self, file: str) -> Origin | None:
        data = self._origins.read(file)
        if data is None:
            return None
        try:
            entry = unseal(data.removesuffix(b"\n"))
            known = Identity(**held_values(Identity, entry["identity"]))
            binding = Binding(**held_values(Binding, entry["binding"]))
            require("a driver's name", DRIVER, binding.driver)
            require("an override", OVERRIDE, binding.override)
            serials = entry.get("serials", [])
            if not isinstance(serials, list) or not all(isinstance(text, str) for text in serials):
                raise ValueError("its serial numbers are not a list of texts")
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise KernelError(
                f"{self._origins.path}/{file} is damaged: {error}",
                hint="remove that file; the device is then given back to the driver that the "
                "kernel chooses",
            ) from error
        return Origin(known, binding, tuple(serials))

    def remember(
        self,
        bus: str,
        name: str,
        identity: Identity,
        binding: Binding,
        serials: tuple[str, ...] = (),
    ) -> None:
        """Keep a device's binding until `forget`, over any number of further changes.

        `serials` are those that only its present driver tells.
        """
        entry = {"identity": asdict(identity), "binding": asdict(binding), "serials": serials}
        self._origins.replace(f"{bus}-{name}", seal(entry))

    def forget(self, bus: str, name: str) -> None:
        self._origins.remove(f"{bus}-{name}")


def _cut_torn_line(descriptor: int, data: bytes) -> None:
    """Drop what a crash left of a last line, so that the next entry starts a line of its own."""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.ftruncate(descriptor, whole)
