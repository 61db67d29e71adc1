"""The executor: run a plan under its locks, verify each step, undo all of it if one fails.

What ends well is committed; what fails is rolled back in exact reverse and raises the failure;
what hangs, or cannot be rolled back, raises Stuck and stays in the journal for `recover`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from vfiotool.change.guard import Allowance, find_blockers, refuse_hurtful
from vfiotool.change.journal import Journal, Record, Transaction, started_at, writer_of
from vfiotool.change.locks import held, lock_keys
from vfiotool.change.signals import Interrupts, kept
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.eswitch import SetEswitchMode
from vfiotool.change.steps.mdev import SetMdev, SetMdevAttribute
from vfiotool.change.steps.registry import not_done
from vfiotool.change.steps.sriov import SetVfCount
from vfiotool.change.steps.state import ANY, device_nodes, read_binding, read_holders
from vfiotool.change.steps.vdpa import SetVdpa
from vfiotool.change.steps.vf_network import SetVfProperty
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import KernelError, NotFound, Stuck, VfiotoolError
from vfiotool.host.host import WRITE_DEADLINE_S, Host
from vfiotool.host.paths import PROC
from vfiotool.host.tree import read_only_root

if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request

LOCK_DEADLINE_S = 60.0
_REPLANS = 8
_ROLL_BACK_TRIES = 3

Progress = Callable[[int, int, Step], None]
T = TypeVar("T")


class NothingToUndo(NotFound):
    """No change of this boot stands."""


@dataclass(frozen=True)
class Outcome:
    """What a change did: its steps, and its number in the journal (None if there were none)."""

    steps: tuple[Step, ...]
    transaction: int | None


@dataclass
class _Path:
    """The journalled writer of one transaction."""

    host: Host
    transaction: Transaction
    timeout_s: float
    interrupts: Interrupts = field(default_factory=Interrupts)
    number: int = 0
    undoing: bool = False
    nodes: tuple[str, ...] = ()

    def begin_step(self, number: int, step: Step) -> None:
        """Make `step` the one in hand, and see which nodes its device has now.

        The kernel takes a device's own node away before it waits for who has it open, so those
        that were seen at an earlier try of the same step count on.
        """
        known = self.nodes if number == self.number else ()
        self.nodes = tuple(dict.fromkeys((*known, *nodes_of(self.host, step))))
        self.number = number

    def write_attribute(self, path: str, data: str) -> None:
        self.interrupts.raise_any()
        self.note("write", path=path, data=data, **writer_of(self.host))
        try:
            self._uninterrupted(lambda: self.host.write_attribute(path, data, self.timeout_s))
        except Stuck:
            raise
        except VfiotoolError:
            self.note("wrote")
            raise
        self.note("wrote")

    def load_module(self, name: str) -> None:
        self.interrupts.raise_any()
        self.note("module", name=name)
        self._uninterrupted(lambda: self.host.load_module(name, self.timeout_s))

    def send_netlink(self, request: Request) -> list[Message]:
        self.interrupts.raise_any()
        self.note("netlink", what=request.what)
        return self._uninterrupted(lambda: self.host.send_netlink(request, self.timeout_s))

    def note(self, kind: str, **values: object) -> None:
        """Journal an entry of the step in hand.

        A roll-back goes on if that fails: the record holds all steps, and one that has no end is
        undone by `recover`.
        """
        try:
            self.transaction.note(kind, n=self.number, **values)
        except KernelError:
            if not self.undoing:
                raise

    @staticmethod
    def _uninterrupted(act: Callable[[], T]) -> T:
        try:
            return act()
        except KeyboardInterrupt as error:
            # The second signal: what the kernel is at goes on, so nothing may be undone yet.
            raise Stuck(
                "interrupted while the kernel worked on it", hint="vfiotool recover"
            ) from error


def change(
    host: Host,
    journal: Journal,
    title: str,
    make: Callable[[], tuple[Step, ...]],
    *,
    guard: Callable[[tuple[Step, ...]], object] | None = None,
    timeout_s: float = WRITE_DEADLINE_S,
    progress: Progress | None = None,
    undoes: int | None = None,
) -> Outcome:
    """Plan with `make` under the locks that the plan needs, and run it.

    `guard` is asked last before the first write, and raises where nothing shall be done (see
    `refuse_hurtful`). `timeout_s` is the deadline of each write. Raises UsageError on a root that
    is not the running host; Refused, NotFound, KernelError, NotPermitted or Unsupported with
    everything rolled back; Stuck where it could not be.
    """
    if not host.live:
        raise read_only_root(host.name)
    steps = make()
    for _ in range(_REPLANS):
        if not steps:
            return Outcome((), None)
        keys = lock_keys(host, steps)
        with held(journal.locks, keys, LOCK_DEADLINE_S):
            steps = make()
            if not steps:
                return Outcome((), None)
            if set(lock_keys(host, steps)) <= set(keys):
                _refuse_unfinished(journal, keys)
                if guard is not None:
                    guard(steps)
                number = _run_all(host, journal, title, steps, keys, timeout_s, progress, undoes)
                return Outcome(steps, number)
    raise KernelError(
        "the host kept changing while the change was planned", hint="try again", errno_name="EAGAIN"
    )


def _refuse_unfinished(journal: Journal, keys: tuple[str, ...]) -> None:
    record = journal.abandoned_on(keys)
    if record is not None:
        raise Stuck(
            f"an earlier change of this device was not finished ({record.number}: {record.title})",
            hint="vfiotool recover",
        )


def _run_all(
    host: Host,
    journal: Journal,
    title: str,
    steps: tuple[Step, ...],
    keys: tuple[str, ...],
    timeout_s: float,
    progress: Progress | None,
    undoes: int | None,
) -> int:
    with kept() as interrupts:
        transaction = journal.begin(title, steps, keys, undoes)
        writer = _Path(host, transaction, timeout_s, interrupts)
        started = 0
        try:
            remember_origins(journal, steps)
            for number, step in enumerate(steps, 1):
                if progress is not None:
                    progress(number, len(steps), step)
                step.check(host)
                started = number
                _run_step(writer, number, step)
            _verify_all(host, steps)
            transaction.end("committed")
        except Stuck as error:
            raise _left_stuck(writer, steps, error) from error
        except BaseException as error:
            _take_all_back(writer, journal, steps, started, error)
            raise
    forget_origins(host, journal, steps, hold=True)
    return transaction.number


def _take_all_back(
    writer: _Path, journal: Journal, steps: tuple[Step, ...], started: int, error: BaseException
) -> None:
    """Roll back what ran because of `error`. Raises Stuck if that cannot be."""
    transaction = writer.transaction
    try:
        _roll_back(writer, steps, range(started, 0, -1), error)
    except Stuck as stuck:
        raise _left_stuck(writer, steps, stuck) from error
    except BaseException as again:
        # Interrupted once more: `recover` ends the roll-back, in this process or another.
        transaction.release()
        raise Stuck(
            f"interrupted while it was taken back: {steps[max(writer.number, 1) - 1].target} is "
            "half done",
            hint="vfiotool recover",
        ) from again
    forget_origins(writer.host, journal, steps)
    try:
        transaction.end("rolled-back", _reason(error))
    except VfiotoolError as again:
        transaction.release()
        raise Stuck(
            f"{_reason(error)}; it was taken back, but the journal could not say so: "
            f"{again.message}",
            hint="make room there, then: vfiotool recover",
            errno_name=again.errno_name,
        ) from error


def _reason(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)


def _run_step(writer: _Path, number: int, step: Step) -> None:
    writer.begin_step(number, step)
    writer.note("step", nodes=writer.nodes)
    step.run(writer)
    if not step.holds(writer.host):
        raise not_done(step)
    writer.note("done")


def _verify_all(host: Host, steps: tuple[Step, ...]) -> None:
    """Read every goal but the last once more: a neighbour may have undone an early step."""
    last: dict[tuple[type, str, str], Step] = {}
    for step in steps:
        if isinstance(step, SetVfCount):
            # The VFs that stood before it are gone, and with them what was set on them.
            vfs = {vf.address for vf in read_vfs(host, step.pf)}
            last = {key: old for key, old in last.items() if _survives(host, old, step.pf, vfs)}
        elif isinstance(step, SetVdpa) and not step.exists:
            # The driver that it let go of before cannot be read any more.
            last = {key: old for key, old in last.items() if old.target != step.name}
        last[_facet(step)] = step
    for step in last.values():
        if step is not steps[-1] and not step.holds(host):
            raise not_done(step)


def _survives(host: Host, step: Step, pf: str, vfs: set[str]) -> bool:
    of_vf = isinstance(step, SetVfProperty) and step.pf == pf
    return not of_vf and step.target not in vfs and step.present(host)


def _facet(step: Step) -> tuple[type, str, str]:
    attribute = step.attribute if isinstance(step, SetMdevAttribute) else ""
    return type(step), step.target, attribute


def _roll_back(
    writer: _Path, steps: tuple[Step, ...], numbers: range, cause: BaseException
) -> None:
    """Undo the steps of those numbers, in that order. Raises Stuck if one cannot be undone."""
    writer.undoing = True
    for number in numbers:
        writer.begin_step(number, steps[number - 1])
        writer.note("undoing")
        try:
            _undo_step(writer, steps[number - 1])
        except VfiotoolError as error:
            text = f"{_reason(cause)}; then undoing step {number} failed: {error.message}"
            raise Stuck(text, errno_name=error.errno_name) from error
        writer.note("undone")


def _undo_step(writer: _Path, step: Step) -> None:
    inverse = step.inverse()
    if inverse is None:
        return
    for left in reversed(range(_ROLL_BACK_TRIES)):
        if not inverse.present(writer.host):
            # Unplugged, or destroyed with its physical function's VFs: nothing to put back.
            return
        try:
            inverse.run(writer)
            if inverse.holds(writer.host):
                return
            raise not_done(inverse)
        except Stuck:
            raise
        except VfiotoolError:
            if not left:
                raise


def _left_stuck(writer: _Path, steps: tuple[Step, ...], error: Stuck) -> Stuck:
    """Journal that the change is stuck at the step in hand, and say who holds the device."""
    step, host, transaction = steps[max(writer.number, 1) - 1], writer.host, writer.transaction
    holders = read_holders(host, (*writer.nodes, *nodes_of(host, step)))
    names = ", ".join(f"process {pid} ({name})" for pid, name in holders)
    message = f"{error.message}; held by {names}" if holders else error.message
    writer.undoing = True
    writer.note("stuck", message=message, holders=[pid for pid, _ in holders])
    transaction.release()
    ending = f"end process {', '.join(str(pid) for pid, _ in holders)}, then: " if holders else ""
    return Stuck(
        f"{step.target} is half done: {message}",
        hint=f"{ending}vfiotool recover",
        device=step.target,
        errno_name=error.errno_name,
    )


def nodes_of(host: Host, step: Step) -> tuple[str, ...]:
    """The device nodes whose open files can hold the step up."""
    if isinstance(step, BindDriver):
        return device_nodes(host, step.bus, step.address)
    if isinstance(step, SetMdev | SetMdevAttribute):
        return device_nodes(host, "mdev", step.uuid)
    if isinstance(step, SetVfCount | SetEswitchMode):
        vfs = [vf.address for vf in read_vfs(host, step.pf)]
        return tuple(node for name in (step.pf, *vfs) for node in device_nodes(host, "pci", name))
    return ()


def remember_origins(journal: Journal, steps: tuple[Step, ...]) -> None:
    """Record where each device stands that is about to be taken from its usual driver."""
    for step in steps:
        if isinstance(step, BindDriver) and step.after.taken and not step.before.taken:
            journal.remember(step.bus, step.address, step.identity, step.before)


def forget_origins(
    host: Host, journal: Journal, steps: tuple[Step, ...], *, hold: bool = False
) -> None:
    """Drop the records of devices that are not taken (any more) or not there.

    With `hold` the steps' goals were just seen to hold, and need not be read again.
    """
    last = {(step.bus, step.address): step for step in steps if isinstance(step, BindDriver)}
    for (bus, address), step in last.items():
        if hold and step.after.driver != ANY:
            taken = step.after.taken
        else:
            try:
                taken = read_binding(host, bus, address).taken
            except NotFound:
                taken = False
        if not taken:
            journal.forget(bus, address)


@dataclass(frozen=True)
class Recovered:
    """What `recover` made of one transaction: `finished`, `undone`, `stuck` or `in progress`."""

    number: int
    title: str
    result: str
    detail: str | None = None


def recover(
    host: Host, journal: Journal, *, timeout_s: float = WRITE_DEADLINE_S, finish: bool | None = None
) -> tuple[Recovered, ...]:
    """Finish or undo every change that a crash, a kill or a held device left half done.

    By default a stuck change is finished (its user still wants it, and nothing failed), anything
    else undone, unless undoing would take a device that is in use; `finish` decides otherwise.
    What is still held is reported as `stuck`, at most `timeout_s` after the call; it raises
    nothing for it.
    """
    if not host.live:
        raise read_only_root(host.name)
    results = []
    # Latest first: an earlier change may be what a later one built on.
    for record, transaction in reversed(journal.unfinished()):
        if transaction is None:
            detail = f"process {record.pid} works on it"
            results.append(Recovered(record.number, record.title, "in progress", detail))
            continue
        with kept() as interrupts, held(journal.locks, record.keys, LOCK_DEADLINE_S):
            number = max(record.started, default=1)
            writer = _Path(host, transaction, timeout_s, interrupts, number, nodes=record.nodes)
            try:
                results.append(_recover_one(writer, journal, record, finish))
            except BaseException:
                transaction.release()
                raise
    return tuple(results)


def _recover_one(writer: _Path, journal: Journal, record: Record, finish: bool | None) -> Recovered:
    host, transaction = writer.host, writer.transaction
    if record.outcome is not None:
        transaction.end(record.outcome, record.error)
        return Recovered(record.number, record.title, _RESULT[record.outcome])
    try:
        _await_writer(host, record, writer.timeout_s)
        forward = _goes_forward(host, record) if finish is None else finish
        outcome, reason = "rolled-back", None
        if forward:
            outcome, reason = _finish(writer, record)
        if outcome == "rolled-back":
            # Undoing a step that never ran writes nothing, so a failed finish undoes them all.
            last = len(record.steps) if forward else max(record.started, default=0)
            cause = KernelError(reason or "undone by recover")
            _roll_back(writer, record.steps, range(last, 0, -1), cause)
    except Stuck as error:
        stuck = _left_stuck(writer, record.steps, error)
        return Recovered(record.number, record.title, "stuck", stuck.message)
    forget_origins(host, journal, record.steps)
    transaction.end(outcome, reason)
    return Recovered(record.number, record.title, _RESULT[outcome], reason)


def _goes_forward(host: Host, record: Record) -> bool:
    """Whether to finish rather than undo: see `recover`.

    A device that came back to the host before the crash may be in use again by now: undoing is
    then no way out. Raises Stuck if finishing would hurt the host as well.
    """
    if record.stuck is not None and not record.undoing:
        return True
    started = record.steps[: max(record.started, default=0)]
    if not find_blockers(host, _inverses(started)):
        return False
    in_use = find_blockers(host, record.steps)
    if in_use:
        raise Stuck(
            f"both ways would hurt this host: {in_use[0].device} {in_use[0].kind}: "
            f"{in_use[0].detail}",
            hint="end that use, then: vfiotool recover",
        )
    return True


_RESULT = {"committed": "finished", "rolled-back": "undone"}


def _finish(writer: _Path, record: Record) -> tuple[str, str | None]:
    """Run what is left of a transaction; the outcome, and why if it cannot be finished."""
    try:
        first = max(record.started, default=1)
        for number in range(first, len(record.steps) + 1):
            step = record.steps[number - 1]
            if number > first:
                step.check(writer.host)
            _run_step(writer, number, step)
        _verify_all(writer.host, record.steps)
    except Stuck:
        raise
    except VfiotoolError as error:
        return "rolled-back", error.message
    return "committed", None


def _await_writer(host: Host, record: Record, timeout_s: float) -> None:
    """Wait for a write that an earlier process left in the kernel. Raises Stuck if it stays."""
    if record.writer is None:
        return
    pid, since = record.writer
    deadline = host.clock.monotonic() + timeout_s
    while started_at(host, pid) == since and _alive(host, pid):
        if host.clock.monotonic() > deadline:
            raise Stuck(f"its last write is still in the kernel, in process {pid}")
        host.clock.sleep(0.02)


def _alive(host: Host, pid: int) -> bool:
    stat = host.read(f"{PROC}/{pid}/stat")
    return stat is not None and stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def undo(
    host: Host,
    journal: Journal,
    allowed: Iterable[Allowance] = (),
    *,
    timeout_s: float = WRITE_DEADLINE_S,
    progress: Progress | None = None,
) -> Record:
    """Take back the last change of this boot that stands. Returns its record.

    Raises NothingToUndo if there is none, and Refused if the host has been changed since, or if
    undoing would cut off a use of the host that is not `allowed`.
    """
    record = last_standing(journal.history())
    _take_back(host, journal, record, allowed, timeout_s, progress)
    return record


def undo_number(
    host: Host, journal: Journal, number: int, *, timeout_s: float = WRITE_DEADLINE_S
) -> None:
    """Take back the committed change of that number. Raises as `undo` does."""
    history = journal.history()
    undone = {record.undoes for record in history if record.outcome == "committed"}
    for record in history:
        if record.number == number and record.outcome == "committed" and number not in undone:
            _take_back(host, journal, record, (), timeout_s, None)
            return
    raise NotFound(f"change {number} does not stand (any more)", hint="vfiotool history")


def _inverses(steps: Iterable[Step]) -> tuple[Step, ...]:
    inverses = (step.inverse() for step in reversed(tuple(steps)))
    return tuple(step for step in inverses if step is not None)


def _take_back(
    host: Host,
    journal: Journal,
    record: Record,
    allowed: Iterable[Allowance],
    timeout_s: float,
    progress: Progress | None,
) -> None:
    steps = _inverses(record.steps)
    permits = tuple(allowed)
    change(
        host,
        journal,
        f"undo {record.number}: {record.title}",
        lambda: steps,
        guard=lambda steps: refuse_hurtful(host, steps, permits),
        timeout_s=timeout_s,
        progress=progress,
        undoes=record.number,
    )


def last_standing(history: list[Record]) -> Record:
    """The latest committed change that is neither undone nor itself an undoing."""
    undone = {record.undoes for record in history if record.outcome == "committed"}
    for record in reversed(history):
        if record.outcome == "committed" and record.undoes is None and record.number not in undone:
            return record
    raise NothingToUndo(
        "there is no change of this boot to undo", hint="vfiotool history lists them"
    )


__all__ = [
    "NothingToUndo",
    "Outcome",
    "Progress",
    "Recovered",
    "change",
    "recover",
    "undo",
]
