"""Whether a controller still works: asked at time-outs, remembered until it is reset."""

from __future__ import annotations

import contextlib
import time

from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.spec import NvmeRegisters
from vfiotool.errors import KernelError, UsageError, VfiotoolError

ALL_ONES = 0xFFFFFFFF
RESET_HINT = "Controller.reset(), or close the device and: vfiotool device reset"
# A wait that has lasted so long looks at the status register, and then again and again.
_PATIENCE_S = 1.0
_LOOK_S = 0.5


class Health:
    """What is known of a controller's state: `failure` says why it does not work any more, None
    while it does. Shared by all of a controller's queues, in any thread."""

    def __init__(self, name: str, registers: NvmeRegisters) -> None:
        self.name = name
        self.registers = registers
        self.failure: str | None = None
        self.closed = False
        self._looked = 0.0

    def refuse(self) -> None:
        """Raises UsageError once the controller is closed, KernelError once it is known not to
        work: a command would be tried in vain."""
        if self.closed:
            raise UsageError(f"the controller {self.name} is closed")
        if self.failure is not None:
            raise self.error()

    def error(self, what: str = "") -> KernelError:
        """The error that tells `failure`; `what` was being waited for."""
        waiting = f"{what}: " if what else ""
        return KernelError(
            f"{self.name}: {waiting}{self.failure}",
            hint=RESET_HINT,
            device=self.name,
            errno_name="ENODEV" if self.failure and "gone" in self.failure else "EIO",
        )

    def look(self) -> str | None:
        """Read CSTS and CC (Base Specification 2.0, 3.1.3.5, 3.1.3.6) and name what is wrong."""
        status = self.registers.status.read()
        if status == ALL_ONES:
            self.failure = "it has gone: its registers read all ones"
        elif status >> 1 & 1:
            self.failure = "it reports a fatal status (CSTS.CFS=1)"
        elif not status & 1:
            enabled = self.registers.configuration.read() & 1
            self.failure = (
                "it is not ready (CSTS.RDY=0)"
                if enabled
                else "it was disabled by a reset (CC.EN=0)"
            )
        return self.failure

    def check(self) -> None:
        """A look at the registers now. Raises KernelError where the controller does not work."""
        self.refuse()
        if self.look() is not None:
            raise self.error()

    def watch(self, deadline: Deadline, what: str = "") -> None:
        """To be called while something is waited for: now and then a look at the registers.
        Raises KernelError as soon as waiting is in vain, UsageError when the controller was
        closed meanwhile."""
        self.refuse()
        now = time.monotonic()
        if now - deadline.began < _PATIENCE_S or now - self._looked < _LOOK_S:
            return
        self._looked = now
        if self.look() is not None:
            raise self.error(what)

    def timed_out(self, what: str, deadline: Deadline, strays: int = 0) -> KernelError:
        """The error of a command that did not end in time, with what the registers say."""
        with contextlib.suppress(VfiotoolError):
            if self.look() is not None:
                return KernelError(
                    f"{self.name}: {what} did not end in {deadline}: {self.failure}",
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
