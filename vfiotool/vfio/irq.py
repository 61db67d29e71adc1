"""Interrupts as eventfds: assigned, waited for, awaited, masked, triggered, taken away.

A PCI device uses one of INTx, MSI and MSI-X at a time; ERR and REQ are the kernel's own messages
and independent of them. Source: VFIO_DEVICE_SET_IRQS in <linux/vfio.h>.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
from collections.abc import AsyncIterator, Iterator, Sequence

from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.native import library as native
from vfiotool.vfio.caps import IrqInfo
from vfiotool.vfio.opened import OpenDevice, refuse_pickle

INTX, MSI, MSIX, ERR, REQ = range(5)
IRQ_NAMES = {INTX: "intx", MSI: "msi", MSIX: "msix", ERR: "err", REQ: "req"}
_ACTION_MASK, _ACTION_UNMASK, _ACTION_TRIGGER = 1 << 3, 1 << 4, 1 << 5


class Interrupt(native.Eventfd):
    """One interrupt. `descriptor` is its eventfd, readable when it has fired; -1 once it is off.

    `wait(timeout_s=None, *, spin_s=0.0)` is C (`cext/python/event_type.c`): how often it fired
    since the last wait, at least 1; 0 when `timeout_s` seconds passed without. None and inf wait
    without limit, less than 0 is 0; `spin_s` seconds are spent looking before it blocks. The
    interpreter's lock is released while it waits, Unix signals are handled. Several may wait at
    once, threads and tasks: each is woken and told what fired since it began. Raises UsageError
    once the interrupt is off, also for those who wait when it is turned off, in a child process,
    and for NaN.

    `trigger()`, `mask()` and `unmask()` are C as well. `trigger` lets the kernel signal the eventfd
    as if the device had: a self-test without hardware. INTx is masked by the kernel whenever it
    fires: acknowledge the device first, then `unmask`. Masking raises Unsupported for what cannot
    be masked.
    """

    def __init__(self, owner: InterruptSet, vector: int) -> None:
        super().__init__(native.eventfd())
        self.owner = owner
        self.vector = vector
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched = -1
        # What had fired when each of the tasks began to wait.
        self._tasks: dict[asyncio.Future[int], int] = {}
        device, info = owner.owner.device, owner.info
        self._maskable = "maskable" in info.flags
        self._arm(device.handle, info.index, vector, self._maskable)

    __reduce_ex__ = refuse_pickle

    def __repr__(self) -> str:
        state = "off" if self.descriptor < 0 else "on"
        return f"<Interrupt {self.description}, {state}>"

    @property
    def description(self) -> str:  # type: ignore[override]
        """What it is called in errors."""
        return f"{self.owner.name} {self.vector} of {self.owner.owner.device.name}"

    def fileno(self) -> int:
        """The eventfd, for `select` and its kind."""
        return self.descriptor

    async def wait_async(self, timeout_s: float | None = None) -> int:
        """As `wait`, for asyncio. Tasks of one event loop may wait at once; raises UsageError for
        a second loop."""
        seconds = native.nanoseconds(timeout_s) / 1e9
        limit = None if timeout_s is None or math.isinf(timeout_s) else seconds
        if count := self.wait(0.0):
            return count
        loop = asyncio.get_running_loop()
        began = self._begin_watching(loop)
        fired: asyncio.Future[int] = loop.create_future()
        self._tasks[fired] = began
        try:
            return await asyncio.wait_for(fired, limit)
        except TimeoutError:
            return 0
        finally:
            self._tasks.pop(fired, None)
            if not self._tasks and self._loop is loop:
                self._end_watching()

    def _begin_watching(self, loop: asyncio.AbstractEventLoop) -> int:
        """Have the loop look at the eventfd; what had fired until then."""
        if self._loop is not None and self._loop is not loop:
            if not self._loop.is_closed():
                raise UsageError(f"{self.description}: another event loop waits for it")
            self._end_watching()
        if self._loop is None:
            began = self._watch()
            self._loop, self._watched = loop, self.descriptor
            loop.add_reader(self._watched, self._wake_tasks)
            return began
        return self._wake_tasks()

    def _end_watching(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._watched)
        self._tasks.clear()
        self._unwatch()

    def _wake_tasks(self) -> int:
        """Take what has fired for the tasks that wait; the sum of all that ever did."""
        total = self._collect()
        for task, began in self._tasks.items():
            if total != began and not task.done():
                task.set_result(total - began)
        return total

    def _refuse_tasks(self) -> None:
        for task in list(self._tasks):
            if not task.done():
                task.set_exception(UsageError(f"{self.description}: is off"))
        self._end_watching()

    def _close(self) -> None:
        """Off: whoever waits, thread or task, is woken with UsageError."""
        super()._close()
        loop = self._loop
        if loop is None:
            return
        # The descriptor stays open until the loop has let go of it: the number must not come to
        # mean another file under it.
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                self._refuse_tasks()
                return
        try:
            loop.call_soon_threadsafe(self._refuse_tasks)
        except RuntimeError:
            self._end_watching()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yields the number of firings each time there are any, until the set is closed."""
        while not self.owner.closed:
            try:
                count = await self.wait_async()
            except UsageError:
                if self.owner.closed:
                    return
                raise
            yield count

    def _refused(self, verb: str, result: int) -> None:
        if verb != "trigger" and result == -errno.EOPNOTSUPP:
            raise Unsupported(f"{self.description} cannot be masked")
        raise native.failed(
            result, f"{verb} {self.description}", device=self.owner.owner.device.name
        )


class MessageInterrupt(Interrupt):
    """An interrupt of a device that no kernel is behind: it is asked by messages."""

    def _ask(self, verb: str, action: int) -> None:
        self._refuse_off()
        device, index = self.owner.owner.device, self.owner.info.index
        result = device.calls.irq_action(index, self.vector, 1, action)
        if result < 0:
            self._refused(verb, result)

    def _refuse_off(self) -> None:
        if self.descriptor < 0:
            raise UsageError(f"{self.description}: is off")

    def trigger(self) -> None:
        self._ask("trigger", _ACTION_TRIGGER)

    def mask(self) -> None:
        self._refuse_unmaskable("mask")
        self._ask("mask", _ACTION_MASK)

    def unmask(self) -> None:
        self._refuse_unmaskable("unmask")
        self._ask("unmask", _ACTION_UNMASK)

    def _refuse_unmaskable(self, verb: str) -> None:
        if not self._maskable:
            self._refused(verb, -errno.EOPNOTSUPP)


class TracedInterrupt(Interrupt):
    """An interrupt that records when it fires; taken when the device was opened with a trace."""

    _total = 0

    def wait(self, timeout_s: float | None = None, *, spin_s: float = 0.0) -> int:
        return self._record(super().wait(timeout_s, spin_s=spin_s))

    def _begin_watching(self, loop: asyncio.AbstractEventLoop) -> int:
        self._total = super()._begin_watching(loop)
        return self._total

    def _wake_tasks(self) -> int:
        before, self._total = self._total, super()._wake_tasks()
        self._record(self._total - before)
        return self._total

    def _record(self, count: int) -> int:
        trace = self.owner.trace
        if count and trace is not None:
            trace.record("irq", index=self.owner.info.index, vector=self.vector, count=count)
        return count


class TracedMessageInterrupt(TracedInterrupt, MessageInterrupt):
    """Both of them."""


# By whether accesses are traced and whether interrupts are asked by messages.
_KINDS: dict[tuple[bool, bool], type[Interrupt]] = {
    (False, False): Interrupt,
    (True, False): TracedInterrupt,
    (False, True): MessageInterrupt,
    (True, True): TracedMessageInterrupt,
}


class InterruptSet:
    """The interrupts of one index that are on: a sequence of `Interrupt`, by vector."""

    def __init__(self, owner: Interrupts, info: IrqInfo, count: int) -> None:
        self.owner = owner
        self.info = info
        self.trace = trace = owner.device.trace
        self.closed = False
        self.vectors: list[Interrupt] = []
        self._unmask: native.Eventfd | None = None
        self._kind = _KINDS[trace is not None, owner.device.calls.messages]
        try:
            for vector in range(count):
                self.vectors.append(self._kind(self, vector))
            self._assign(0, [interrupt.descriptor for interrupt in self.vectors])
        except BaseException:
            self._close_eventfds()
            raise
        if trace is not None:
            trace.record("irq-on", index=info.index, count=count)

    def __repr__(self) -> str:
        state = "off" if self.closed else f"{len(self.vectors)} on"
        return f"<InterruptSet {self.name} of {self.owner.device.name}, {state}>"

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, vector: int) -> Interrupt:
        """Raises UsageError for a vector that is not on."""
        try:
            return self.vectors[vector]
        except IndexError:
            raise UsageError(
                f"{self.name} {vector} of {self.owner.device.name}: "
                f"{len(self.vectors)} of its {self.info.count} vectors are on, 0 is the first",
                device=self.owner.device.name,
            ) from None

    def __iter__(self) -> Iterator[Interrupt]:
        return iter(self.vectors)

    @property
    def name(self) -> str:
        return self.owner.name(self.info.index)

    def refuse_closed(self) -> None:
        if self.closed:
            raise UsageError(f"{self.name} of {self.owner.device.name} is off")
        self.owner.device.refuse_closed()

    def _assign(self, start: int, descriptors: Sequence[int]) -> None:
        device = self.owner.device
        result = device.calls.irq_assign(self.info.index, start, descriptors)
        operation = f"turn on {len(descriptors)} {self.name} of {device.name}"
        if result > 0:
            raise KernelError(f"{operation}: there are only {result} vectors", device=device.name)
        native.check(result, operation, device=device.name)

    def add(self, count: int = 1) -> None:
        """Turn on further vectors (MSI-X). Where the kernel cannot add to those in use
        (`noresize`), all are turned off and on again, and what fires in between is lost."""
        self.refuse_closed()
        old = len(self.vectors)
        if count < 1 or old + count > self.info.count:
            raise UsageError(f"{self.owner.device.name} has {self.info.count} {self.name}")
        fresh: list[Interrupt] = []
        try:
            for vector in range(old, old + count):
                fresh.append(self._kind(self, vector))
            self.vectors += fresh
            if "noresize" in self.info.flags:
                self._off()
                self._assign(0, [interrupt.descriptor for interrupt in self.vectors])
            else:
                self._assign(old, [interrupt.descriptor for interrupt in fresh])
        except BaseException:
            del self.vectors[old:]
            for interrupt in fresh:
                interrupt._close()
            raise

    def unmask_by_eventfd(self) -> int:
        """An eventfd that unmasks INTx whenever it is written. Closed with the set."""
        self.refuse_closed()
        if self._unmask is None:
            event = native.Eventfd(native.eventfd())
            calls = self.owner.device.calls
            result = calls.irq_unmask_fd(self.info.index, event.descriptor)
            if result < 0:
                event._close()
                raise native.failed(
                    result,
                    f"unmask {self.name} by eventfd",
                    device=self.owner.device.name,
                )
            self._unmask = event
        return self._unmask.descriptor

    def rearm(self) -> None:
        """Assign the eventfds again: a reset of the device takes them away."""
        self.refuse_closed()
        self._off()
        self._assign(0, [interrupt.descriptor for interrupt in self.vectors])

    def _off(self) -> int:
        return self.owner.device.calls.irq_action(self.info.index, 0, 0, _ACTION_TRIGGER)

    def close(self) -> None:
        """Turn the index off and close its eventfds. Closing twice is nothing."""
        if self.closed:
            return
        self.closed = True
        self.owner.forget(self)
        result = 0
        try:
            if not self.owner.device.closed:
                result = self._off()
        finally:
            self._close_eventfds()
        if self.trace is not None:
            self.trace.record("irq-off", index=self.info.index)
        native.check(result, f"turn off {self.name} of {self.owner.device.name}")

    def _close_eventfds(self) -> None:
        for interrupt in self.vectors:
            interrupt._close()
        if self._unmask is not None:
            self._unmask._close()
            self._unmask = None

    def __enter__(self) -> InterruptSet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Interrupts:
    """What a device can signal, and the sets that are on."""

    def __init__(self, device: OpenDevice, infos: Sequence[IrqInfo | None]) -> None:
        self.device = device
        self.infos = tuple(infos)
        self.active: dict[int, InterruptSet] = {}

    def __repr__(self) -> str:
        on = ", ".join(f"{s.name}: {len(s)}" for s in self.active.values()) or "all off"
        return f"<Interrupts of {self.device.name}, {on}>"

    def name(self, index: int) -> str:
        """What people call an index; only a PCI device's have names."""
        return IRQ_NAMES.get(index, f"irq {index}") if self.device.info.is_pci else f"irq {index}"

    def enable(self, index: int, count: int) -> InterruptSet:
        """Turn on the first `count` interrupts of an index.

        Raises Unsupported where the device has none, UsageError for more than it has or while
        another kind is on.
        """
        self.device.refuse_closed()
        info = self.infos[index] if 0 <= index < len(self.infos) else None
        name = self.name(index)
        if info is None or not info.count:
            raise Unsupported(f"{self.device.name} has no {name}", device=self.device.name)
        if not 0 < count <= info.count:
            raise UsageError(f"{self.device.name} has {info.count} {name}, not {count}")
        exclusive = self.device.info.is_pci and index <= MSIX
        for active in self.active:
            if active == index or (exclusive and active <= MSIX):
                raise UsageError(
                    f"{self.name(active)} of {self.device.name} is on: one kind at a time",
                    hint="close it before another is turned on",
                )
        self.active[index] = InterruptSet(self, info, count)
        return self.active[index]

    def intx(self) -> Interrupt:
        """The INTx pin. It is masked by the kernel when it fires; see `Interrupt.unmask`."""
        return self.enable(INTX, 1)[0]

    def msi(self, count: int = 1) -> InterruptSet:
        """`count` MSI vectors."""
        return self.enable(MSI, count)

    def msix(self, count: int = 1) -> InterruptSet:
        """`count` MSI-X vectors; `InterruptSet.add` turns on more."""
        return self.enable(MSIX, count)

    def error(self) -> Interrupt:
        """Uncorrectable errors of a PCIe device (AER)."""
        return self.enable(ERR, 1)[0]

    def request(self) -> Interrupt:
        """The kernel asks for the device back (hot unplug, unbind): close it soon."""
        return self.enable(REQ, 1)[0]

    def forget(self, interrupts: InterruptSet) -> None:
        self.active = {k: v for k, v in self.active.items() if v is not interrupts}

    def rearm(self) -> None:
        """Assign all eventfds again, as after a reset."""
        for interrupts in list(self.active.values()):
            interrupts.rearm()

    def close(self) -> None:
        """Turn everything off; the first error is raised after the last was tried."""
        first: BaseException | None = None
        for interrupts in list(self.active.values()):
            try:
                interrupts.close()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first
