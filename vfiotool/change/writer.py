"""The write path of one transaction: guarded, journalled, and run one step at a time.

Nothing else in the package writes to a host. Each step and, within it, each write that can take
something from somebody is preceded by a look at who uses it now (`guard.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from vfiotool.change.guard import Allowance, Look, refuse_uses
from vfiotool.change.journal import Journal, Transaction, writer_of
from vfiotool.change.signals import KeptSignals
from vfiotool.change.steps.base import AnotherDevice, Step
from vfiotool.change.steps.registry import not_done
from vfiotool.change.steps.state import ANY, read_binding, read_holders
from vfiotool.devices.serial import drive_serials
from vfiotool.errors import KernelError, NotFound, Refused, Stuck, VfiotoolError
from vfiotool.host.host import Host

if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request

_ROLL_BACK_TRIES = 3
_CLAIM_TRIES = 2
_Value = TypeVar("_Value")


class InterruptedWrite(Stuck):
    """The second signal came while the kernel worked: `recover` undoes what was begun."""


@dataclass
class StepWriter:
    """The journalled write path of one transaction; see the module."""

    host: Host
    transaction: Transaction
    timeout_s: float
    allowed: tuple[Allowance, ...] = ()
    interrupts: KeptSignals = field(default_factory=KeptSignals)
    number: int = 0
    undoing: bool = False
    nodes: tuple[str, ...] = ()
    step: Step | None = None

    def begin_step(self, number: int, step: Step) -> None:
        """Make `step` the one in hand, and see which nodes its device has now.

        The kernel takes a device's own node away before it waits for who has it open, so those
        that were seen at an earlier try of the same step count on.
        """
        known = self.nodes if number == self.number else ()
        self.nodes = tuple(dict.fromkeys((*known, *step.nodes(self.host))))
        self.number, self.step = number, step

    def guard(self) -> Look:
        """What the step in hand takes. Raises Refused if somebody uses it now."""
        if self.step is None:
            return Look()
        return refuse_uses(self.host, (self.step,), self.allowed)

    def write_attribute(self, path: str, data: str, *, harmless: bool = False) -> None:
        """One write, with a look before it at who uses what it takes, unless it is `harmless`.

        The disks that it takes are claimed from then on until it is written.
        """
        self.interrupts.raise_any()
        if harmless or self.step is None:
            self._write(path, data, ())
            return
        for _ in range(_CLAIM_TRIES):
            seen = self.guard()
            if self._write(path, data, seen.disks):
                return
        if not seen.has_a_disk_in_use:
            raise Refused(
                f"{', '.join(seen.disks)}: somebody takes it and lets it go again all the time",
                hint="end that use first; lsblk and fuser may show it",
            )
        # What has it was looked at, and is allowed.
        self._write(path, data, ())

    def _write(self, path: str, data: str, disks: tuple[str, ...]) -> bool:
        """Whether it was written: nobody had one of the disks claimed."""
        self.note("write", path=path, data=data, **writer_of(self.host))
        try:
            written = self._uninterrupted(
                lambda: self.host.write_claiming(path, data, disks, self.timeout_s)
            )
        except Stuck:
            raise
        except VfiotoolError:
            self.note("wrote")
            raise
        self.note("wrote")
        return written

    def load_module(self, name: str) -> None:
        self.interrupts.raise_any()
        self.note("module", name=name)
        self._uninterrupted(lambda: self.host.load_module(name, self.timeout_s))

    def send_netlink(self, request: Request) -> list[Message]:
        self.interrupts.raise_any()
        self.guard()
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
    def _uninterrupted(act: Callable[[], _Value]) -> _Value:
        try:
            return act()
        except KeyboardInterrupt as error:
            # The second signal: what the kernel is at goes on, so nothing may be undone yet.
            raise InterruptedWrite(
                "interrupted while the kernel worked on it", hint="vfiotool recover"
            ) from error


def run_step(writer: StepWriter, number: int, step: Step) -> None:
    """Run one step whose target has been checked. Raises what `Step.run` and the guard raise."""
    writer.begin_step(number, step)
    writer.guard()
    writer.note("step", nodes=writer.nodes)
    step.run(writer)
    if not step.holds(writer.host):
        raise not_done(step)
    writer.note("done")


def verify_all(host: Host, steps: tuple[Step, ...]) -> None:
    """Read every goal but the last once more: a neighbour may have undone an early step."""
    last: dict[tuple[type, str, str], Step] = {}
    for step in steps:
        last = {key: old for key, old in last.items() if old.outlives(host, step)}
        last[type(step), step.target, step.facet] = step
    for step in last.values():
        if step is not steps[-1] and not step.holds(host):
            raise not_done(step)


def roll_back(
    writer: StepWriter, steps: tuple[Step, ...], numbers: Iterable[int], cause: BaseException
) -> None:
    """Undo the steps of those numbers, in that order. Raises Stuck if one cannot be undone."""
    writer.undoing = True
    for number in numbers:
        inverse = steps[number - 1].inverse()
        writer.begin_step(number, inverse or steps[number - 1])
        writer.note("undoing")
        try:
            if inverse is not None:
                _undo(writer, inverse)
        except VfiotoolError as error:
            text = f"{reason_of(cause)}; then undoing step {number} failed: {error.message}"
            kind = InterruptedWrite if isinstance(error, InterruptedWrite) else Stuck
            raise kind(text, errno_name=error.errno_name) from error
        writer.note("undone")


def _undo(writer: StepWriter, inverse: Step) -> None:
    for left in reversed(range(_ROLL_BACK_TRIES)):
        if not inverse.present(writer.host):
            # Unplugged, or destroyed with its physical function's VFs: nothing to put back.
            return
        try:
            inverse.check(writer.host, begun=True)
            writer.guard()
            inverse.run(writer)
            if inverse.holds(writer.host):
                return
            raise not_done(inverse)
        except AnotherDevice:
            # What the step was about is gone, and this one was never changed.
            return
        except (Stuck, Refused):
            raise
        except VfiotoolError:
            if not left:
                raise


def reason_of(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)


def left_stuck(writer: StepWriter, steps: tuple[Step, ...], error: Stuck) -> Stuck:
    """Journal that the change is stuck at the step in hand, and say who holds the device."""
    step, host, transaction = steps[max(writer.number, 1) - 1], writer.host, writer.transaction
    holders = read_holders(host, (*writer.nodes, *step.nodes(host)))
    names = ", ".join(f"process {pid} ({name})" for pid, name in holders)
    message = f"{error.message}; held by {names}" if holders else error.message
    writer.undoing = True
    writer.note(
        "stuck",
        message=message,
        holders=[pid for pid, _ in holders],
        interrupted=isinstance(error, InterruptedWrite),
    )
    transaction.release()
    ending = f"end process {', '.join(str(pid) for pid, _ in holders)}, then: " if holders else ""
    return Stuck(
        f"{step.target} is half done: {message}",
        hint=f"{ending}vfiotool recover",
        device=step.target,
        errno_name=error.errno_name,
    )


def remember_origins(host: Host, journal: Journal, steps: Iterable[Step]) -> None:
    """Record where each device stands that is about to be taken from its usual driver.

    So are a disk's serial numbers, which nobody can read once its driver has let go of it.
    """
    for step in steps:
        change = step.rebinding
        if change is not None and change.after.taken and not change.before.taken:
            serials = drive_serials(host, change.name) if change.bus == "pci" else ()
            journal.remember(change.bus, change.name, change.identity, change.before, serials)


def forget_origins(
    host: Host, journal: Journal, steps: Iterable[Step], *, hold: bool = False
) -> None:
    """Drop the records of devices that are not taken (any more) or not there.

    With `hold` the steps' goals were just seen to hold, and need not be read again.
    """
    found = (step.rebinding for step in steps)
    last = {(change.bus, change.name): change for change in found if change is not None}
    for (bus, name), change in last.items():
        if hold and change.after.driver != ANY:
            taken = change.after.taken
        else:
            try:
                taken = read_binding(host, bus, name).taken
            except NotFound:
                taken = False
        if not taken:
            journal.forget(bus, name)
