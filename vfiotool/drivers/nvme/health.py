"""Whether a controller still works: asked at time-outs, remembered until it is reset."""

from __future__ import annotations

import contextlib
import threading
import time

from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.spec import NvmeRegisters
from vfiotool.errors import KernelError, UsageError, VfiotoolError
from vfiotool.native.library import fork_generation
from vfiotool.vfio import refuse_child

ALL_ONES = 0xFFFFFFFF
RESET_HINT = "Controller.reset(), or close the device and: vfiotool device reset"
# A wait that has lasted so long looks at the status register, and then again and again.
_PATIENCE_S = 1.0
_LOOK_S = 0.5
_SLICE_S = 0.25


class Health:
    """What is known of a controller's state: `failure` says why it does not work any more, None
    while it does. Shared by all of a controller's queues, in any thread."""

    def __init__(self, name: str, registers: NvmeRegisters) -> None:
        self.name = name
        self.registers = registers
        self.failure: str | None = None
        self.closed = False
        self._generation = fork_generation()
        self._looked = 0.0
        self._told = 0
        self._lock = threading.Lock()

    @property
    def in_child(self) -> bool:
        """Whether this is a child of the process that brought the controller up."""
        return self._generation != fork_generation()

    def refuse_child(self) -> None:
        """Raises UsageError in a child process. Before any lock is taken: there it may be held for
        ever, by a thread that is the parent's."""
        if self._generation != fork_generation():
            refuse_child(self._generation)

    def tell(self, failure: str | None) -> None:
        """What a reset makes of it: what others read from the registers before is out of date."""
        with self._lock:
            self._told += 1
            self.failure = failure

    def refuse(self) -> None:
        """Raises UsageError once the controller is closed, KernelError once it is known not to
        work: a command would be tried in vain."""
        if self.closed:
            raise UsageError(f"the controller {self.name} is closed")
        if (failure := self.failure) is not None:
            raise self.error(failure)

    def error(self, failure: str, what: str = "") -> KernelError:
        """The error that tells `failure`; `what` was being waited for."""
        # Not `self.failure`: a reset in another thread may have cleared that meanwhile.
        waiting = f"{what}: " if what else ""
        return KernelError(
            f"{self.name}: {waiting}{failure}",
            hint=RESET_HINT,
            device=self.name,
            errno_name="ENODEV" if "gone" in failure else "EIO",
        )

    def look(self) -> str | None:
        """Read CSTS and CC (Base Specification 2.0, 3.1.3.5, 3.1.3.6) and name what is wrong."""
        told, found = self._told, None
        status = self.registers.status.read()
        if status == ALL_ONES:
            found = "it has gone: its registers read all ones"
        elif status >> 1 & 1:
            found = "it reports a fatal status (CSTS.CFS=1)"
        elif not status & 1:
            enabled = self.registers.configuration.read() & 1
            found = (
                "it is not ready (CSTS.RDY=0)"
                if enabled
                else "it was disabled by a reset (CC.EN=0)"
            )
        with self._lock:
            if found is not None and told == self._told:
                self.failure = found
            return self.failure

    def check(self) -> None:
        """A look at the registers now. Raises KernelError where the controller does not work."""
        self.refuse()
        if (failure := self.look()) is not None:
            raise self.error(failure)

    def explain(self) -> None:
        """After the doorbells could not be reached: raises KernelError if that is a reset, which
        is known as soon as the registers can be read again (a second at most)."""
        deadline = Deadline(_PATIENCE_S)
        while not deadline.passed:
            try:
                self.check()
                return
            except UsageError:
                if self.closed:
                    raise
                deadline.pause()

    def watch(self, deadline: Deadline, what: str = "") -> None:
        """To be called while something is waited for: now and then a look at the registers.
        Raises KernelError as soon as waiting is in vain, UsageError when the controller was
        closed meanwhile."""
        self.refuse()
        now = time.monotonic()
        if now - deadline.began < _PATIENCE_S or now - self._looked < _LOOK_S:
            return
        self._looked = now
        if (failure := self.look()) is not None:
            raise self.error(failure, what)

    def refuse_gone(self) -> None:
        """Raises KernelError (ENODEV) where the device does not answer reads any more."""
        if self.registers.status.read() == ALL_ONES:
            raise KernelError(
                f"{self.name} has gone: its registers read all ones", errno_name="ENODEV"
            )

    def await_status(self, field: str, value: int, timeout_s: float) -> None:
        """Until a field of the status register has a value. Raises KernelError (ETIMEDOUT), and at
        once (ENODEV) when the device goes meanwhile: all ones would be waited for in vain."""
        deadline = Deadline(timeout_s)
        while True:
            try:
                self.registers.status.poll_field(field, value, min(_SLICE_S, deadline.left()))
                return
            except KernelError:
                self.refuse_gone()
                if deadline.passed:
                    raise

    def await_ready(self, timeout_s: float, hint: str) -> None:
        """Until an enabled controller is ready. Raises KernelError (ETIMEDOUT, with `hint`), and
        at once where it reports a fatal status."""
        end = time.monotonic() + timeout_s
        while True:
            status = self.registers.status.fields()
            if status["fatal"]:
                raise KernelError(f"{self.name} reports a fatal error (CSTS.CFS)")
            if status["ready"]:
                return
            if time.monotonic() >= end:
                raise KernelError(
                    f"{self.name} was not ready within {timeout_s:g} s",
                    hint=hint,
                    errno_name="ETIMEDOUT",
                )
            time.sleep(1e-3)

    def shut_down(self, wait_s: float) -> KernelError | None:
        """Section 3.6.1: notify, and wait for at most `wait_s` seconds; the error of a controller
        that did not finish, to be raised when all else is done."""
        configuration = self.registers.configuration
        status = self.registers.status.fields()
        if not configuration.field("enable") or not status["ready"] or status["fatal"]:
            return None
        configuration.modify(shutdown=1)
        try:
            self.await_status("shutdown", 2, wait_s)
        except KernelError as error:
            if error.errno_name == "ENODEV":
                return None
            return KernelError(
                f"{self.name} did not finish its shutdown within {wait_s:g} s: what its "
                "write cache held may be lost",
                hint="flush before closing; check the data that was written last",
                device=self.name,
                errno_name="ETIMEDOUT",
            )
        return None

    def timed_out(self, what: str, deadline: Deadline, strays: int = 0) -> KernelError:
        """The error of a command that did not end in time, with what the registers say."""
        with contextlib.suppress(VfiotoolError):
            if (failure := self.look()) is not None:
                return KernelError(
                    f"{self.name}: {what} did not end in {deadline}: {failure}",
                    hint=RESET_HINT,
                    device=self.name,
                    errno_name="ETIMEDOUT",
                )
        seen = f"; {strays} completions came that were no command's" if strays else ""
        return KernelError(
            f"{self.name}: {what} did not end in {deadline}{seen}",
            hint=f"the controller says that it is ready; it may be slow, or: {RESET_HINT}",
            device=self.name,
            errno_name="ETIMEDOUT",
        )
