"""NVMe: a polled user-space driver for one controller, its namespaces and I/O queues.

    with Device.open("0000:01:00.0") as device:
        controller = Controller(device)
        disk = controller.namespace(1)
        queue = controller.create_queue()
        block = queue.read(disk, lba=0, blocks=1)

Sources: NVM Express Base Specification 2.0, sections cited below. The hot path is C, reached
through `queue_pair.py`; what is here happens once a queue, or waits for a device.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.creation import create_pair, delete_pair
from vfiotool.drivers.nvme.deadline import Deadline
from vfiotool.drivers.nvme.health import ALL_ONES, Health
from vfiotool.drivers.nvme.identify import (
    COMMAND_SETS,
    ControllerIdentity,
    Namespace,
    command_set_of,
    namespace_list,
)
from vfiotool.drivers.nvme.in_flight import InFlight
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.memory_buffer import ControllerMemory, MemoryBuffer, MemoryPiece
from vfiotool.drivers.nvme.queue_pair import Completion, Doorbells, QueuePair, Rings
from vfiotool.drivers.nvme.shared import SharedInFlight
from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.vfio import Device, DmaBuffer, Interrupt, Mapping

ADMIN_ENTRIES = 32
ADMIN_TIMEOUT_S = 10.0
QUEUE_ENTRIES = 128
# A PRP list of one page tells 2 MiB of 4 KiB pages (cext/nvme/nvme_queue.c keeps to one).
TRANSFER_LIMIT = 2 << 20
# The steps of a controller's end; with a controller that answers nothing they add up to 14 s.
_DRAIN_S, _DELETE_S, _SHUTDOWN_S, _DISABLE_S = 1.0, 3.0, 5.0, 5.0
# For the threads that are told of a reset, on a machine that has too much to do to run them.
_TOLD_S = 10.0
_SHUTDOWN_LIMIT_S = 60.0
_LEAVE_S = 0.2
_PAGE = 4096
_OFFLINE_HINT = (
    "a VF comes up once its PF has given it queues and interrupts and brought it online: "
    "nvme virt-mgmt"
)
_open: weakref.WeakKeyDictionary[Device, weakref.ref[Controller]] = weakref.WeakKeyDictionary()


class Controller:
    """A controller, brought up: admin queue running, identified, queues of I/O to be created.

    Raises Unsupported for what is not an NVMe controller or lacks the NVM command set, UsageError
    while `device` has another Controller that is not closed, KernelError when it does not come up.
    When `device` is closed the controller is shut down first, so that no DMA is left when its
    memory goes. Admin commands can come from any thread. `weighted` gives queues priorities
    (weighted round robin, 3.4.4; `admin.Feature.ARBITRATION` has the weights) or is Unsupported.
    """

    _closed: bool = False

    def __init__(
        self, device: Device, *, shadow_doorbells: bool = False, weighted: bool = False
    ) -> None:
        if device.info.is_pci and device.class_code != nvme_spec.CLASS_CODE:
            raise Unsupported(f"{device.name} is not an NVMe controller", device=device.name)
        other = _open.get(device, lambda: None)()
        if other is not None and not other._closed:
            raise UsageError(
                f"{device.name} has a Controller already", hint="close it, or call its reset()"
            )
        self.device = device
        region = device.region(0)
        access = region.access()
        self.registers = nvme_spec.NvmeRegisters(access)
        # The doorbells are mapped also where the registers before them cannot be.
        self.bar = access if isinstance(access, Mapping) else region.map(nvme_spec.DOORBELLS)
        self._capabilities = self.registers.capabilities.fields()
        if weighted and not self._capabilities["arbitration"] & 1:
            raise Unsupported(f"{device.name} has no weighted round robin between its queues")
        self._weighted = weighted
        self._timeout_s = max(1.0, self._capabilities["timeout"] * 0.5)
        self.page_bytes = _PAGE << self._capabilities["page_min"]
        self.health = Health(device.name, self.registers)
        self.interrupts: list[Interrupt] = []
        self.queues: dict[int, IoQueue] = {}
        self._undead: list[IoQueue] = []  # their deletion failed: the controller may know them
        self._buffers: list[DmaBuffer | MemoryPiece] = []
        self._memory = ControllerMemory(device, self.registers, self.page_bytes, self.admin)
        self._making = threading.RLock()
        self._with_shadows = shadow_doorbells
        self._shadows: tuple[DmaBuffer, DmaBuffer] | None = None
        device.on_close(self.close)
        _open[device] = weakref.ref(self)
        try:
            self._disable()
            self._make_admin()
            self._enable()
            self._learn()
        except BaseException:
            with contextlib.suppress(VfiotoolError):
                self.close()
            raise

    def _learn(self) -> None:
        self.identity = ControllerIdentity.parse(self.identify(nvme_spec.CNS_CONTROLLER))
        self.max_transfer = self._max_transfer()
        self.queue_limit = self._ask_queues()
        self._memory.learn(self._doorbells(self.queue_limit + 1).tail, self.identity.raw)
        if self._with_shadows:
            self._set_doorbell_buffers()

    @property
    def memory_buffer(self) -> MemoryBuffer | None:
        """Its memory buffer, which `create_queue` can place a submission queue in; None where it
        has none."""
        return self._memory.found

    def _max_transfer(self) -> int:
        pages = self.identity.max_transfer_pages
        return min(TRANSFER_LIMIT, pages * self.page_bytes if pages else TRANSFER_LIMIT)

    def _disable(self, timeout_s: float | None = None) -> None:
        """Section 3.5.1, step 1 of initialization; also what ends all DMA."""
        self.health.refuse_gone()
        configuration = self.registers.configuration
        if configuration.field("enable"):
            configuration.modify(enable=0)
        self.health.await_status("ready", 0, timeout_s or self._timeout_s)

    def _make_admin(self) -> None:
        if not any(self._capabilities.values()):
            raise KernelError(
                f"{self.device.name} is offline: its capabilities read zero", hint=_OFFLINE_HINT
            )
        # CAP.CSS: bit 0 the NVM command set, bit 6 a choice of sets (3.1.3.1).
        if not self._capabilities["command_sets"] & 0x41:
            raise Unsupported(f"{self.device.name} does not speak the NVM command set")
        rings = self._rings(0, ADMIN_ENTRIES, ADMIN_ENTRIES, lists=False)
        self._admin = QueuePair(rings, self._doorbells(0))
        self._commands = InFlight(self._admin, self.health)
        self._shared = SharedInFlight(self._commands)

    def _enable(self) -> None:
        """Section 3.5.1, steps 2 to 6."""
        self._memory.restore()
        registers, rings = self.registers, self._admin.rings
        self.device.set_bus_master(True)
        registers.admin_queues.set(sq_size=ADMIN_ENTRIES - 1, cq_size=ADMIN_ENTRIES - 1)
        registers.admin_submission.write(rings.submission.iova)
        registers.admin_completion.write(rings.completion.iova)
        registers.configuration.set(
            enable=1,
            # CC.CSS 110b: all command sets that it has (3.1.3.5), zoned namespaces among them.
            command_set=6 if self._capabilities["command_sets"] >> 6 & 1 else 0,
            page_size=self._capabilities["page_min"],
            arbitration=int(self._weighted),
            sq_entry_size=6,
            cq_entry_size=4,
        )
        self.health.await_ready(self._timeout_s, _OFFLINE_HINT)

    def _alloc(self, size: int) -> DmaBuffer:
        buffer = self.device.dma.alloc(size, align=self.page_bytes)
        self._buffers.append(buffer)
        return buffer

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[DmaBuffer]:
        """A DMA buffer for an admin command. After a time-out the controller may still reach it:
        then it is kept until the controller is closed."""
        buffer = self._alloc(size)
        try:
            yield buffer
        finally:
            if not self._commands.uses(buffer):
                self._free(buffer)

    def keep(self, buffers: Iterable[DmaBuffer]) -> None:
        """Buffers that commands may still reach: they are closed when the controller is."""
        self._buffers += buffers

    def _free(self, *buffers: DmaBuffer | MemoryPiece | None) -> None:
        for buffer in buffers:
            if buffer is not None and buffer in self._buffers:
                self._buffers.remove(buffer)
                buffer.close()

    def _rings(
        self,
        number: int,
        sq_entries: int,
        cq_entries: int,
        *,
        lists: bool,
        lazy: bool = False,
        placed: bool = False,
    ) -> Rings:
        submission = self._memory.place(sq_entries * 64) if placed else None
        if submission is not None:
            self._buffers.append(submission)
        return Rings(
            submission=submission or self._alloc(sq_entries * 64),
            completion=self._alloc(cq_entries * 16),
            lists=self._alloc(sq_entries * self.page_bytes) if lists else None,
            sq_entries=sq_entries,
            cq_entries=cq_entries,
            page_bytes=self.page_bytes,
            id=number,
            lazy=lazy,
        )

    def _doorbells(self, number: int) -> Doorbells:
        """Section 3.1.3, figure 35: SQyTDBL and CQyHDBL; with the shadows of 5.8 but for admin."""
        stride = 4 << self._capabilities["stride"]
        tail, head = 2 * number * stride, (2 * number + 1) * stride
        shadows = (0, 0, 0, 0)
        if number and self._shadows is not None:
            words, events = (buffer.address for buffer in self._shadows)
            shadows = (words + tail, words + head, events + tail, events + head)
        return Doorbells(self.bar, nvme_spec.DOORBELLS + tail, nvme_spec.DOORBELLS + head, shadows)

    def _ask_queues(self) -> int:
        """Section 5.27.1.5: ask for many, be told how many there are."""
        wanted = 0xFFFE
        dwords = (nvme_spec.FEATURE_QUEUES, wanted << 16 | wanted)
        result = self.admin(nvme_spec.command(nvme_spec.SET_FEATURES, dwords=dwords)).result
        return min(result & 0xFFFF, result >> 16) + 1

    def _set_doorbell_buffers(self) -> None:
        if not self.identity.doorbell_buffers:
            raise Unsupported(f"{self.device.name} takes no shadow doorbells")
        if self._shadows is None:
            self._shadows = (self._alloc(self.page_bytes), self._alloc(self.page_bytes))
        for buffer in self._shadows:
            buffer.view[:] = bytes(buffer.size)
        words, events = (buffer.iova for buffer in self._shadows)
        self.admin(nvme_spec.command(nvme_spec.DOORBELL_BUFFERS, prp1=words, prp2=events))

    def admin(
        self,
        command: bytes,
        timeout_s: float | None = None,
        *,
        what: str = "",
        holds: tuple[DmaBuffer, ...] = (),
    ) -> Completion:
        """Run an admin command (64 bytes, see `nvme_spec.command`) to its own end, for at most
        `timeout_s` seconds (`ADMIN_TIMEOUT_S`; infinity waits without limit). `holds` are the
        buffers that it uses.

        Raises KernelError with the controller's words if it fails; ETIMEDOUT, with what the status
        register says, if no answer comes: one that comes later goes to `aside`. After a status
        that is fatal no further command is tried until `reset`.
        """
        what = what or f"admin command {command[0]:#x}"
        deadline = Deadline(ADMIN_TIMEOUT_S if timeout_s is None else timeout_s)
        return self._shared.call(partial(self._admin.submit_raw, command), deadline, what, holds)

    def request_event(self, told: Callable[[int, int], object]) -> None:
        """Send an Asynchronous Event Request (5.2); `told(status, result)` is called by `look`, or
        any admin command, when it ends."""
        self._shared.send(
            partial(self._admin.submit_raw, nvme_spec.command(nvme_spec.ASYNC_EVENT)),
            lambda done: told(done.status, done.result),
        )

    def look(self) -> None:
        """Take what has come for the admin queue, without waiting."""
        self.health.refuse()
        self._shared.look()

    @property
    def aside(self) -> list[Completion]:
        """Completions of admin commands that came after their call had given up."""
        if not self._closed and self.health.failure is None:
            self._shared.look()
        return list(self._commands.aside)

    def identify(
        self, cns: int, nsid: int = 0, controller_id: int = 0, *, command_set: int = 0
    ) -> bytes:
        """Identify (5.17): 4096 bytes of the structure `cns`."""
        dwords = (cns | controller_id << 16, command_set << 24)
        return self.fetch(nvme_spec.IDENTIFY, nsid, dwords, _PAGE, f"identify {cns:#x}")

    def fetch(self, opcode: int, nsid: int, dwords: tuple[int, ...], size: int, what: str) -> bytes:
        """Run an admin command that returns up to a page of data."""
        with self.memory(self.page_bytes) as page:
            command = nvme_spec.command(opcode, nsid, prp1=page.iova, dwords=dwords)
            self.admin(command, what=what, holds=(page,))
            return bytes(page.view[:size])

    def namespaces(self) -> list[int]:
        """The identifiers of the active namespaces, however many."""
        return namespace_list(partial(self.identify, nvme_spec.CNS_ACTIVE_NAMESPACES))

    def namespace(self, nsid: int) -> Namespace:
        """The namespace `nsid`. Raises KernelError where there is none, UsageError for one that is
        not active, Unsupported for one whose command set has no blocks."""
        try:
            raw = self.identify(nvme_spec.CNS_NAMESPACE, nsid)
        except KernelError:
            self._refuse_set(nsid)
            raise
        if not any(raw[:8]):
            active = ", ".join(map(str, self.namespaces())) or "none"
            raise UsageError(f"namespace {nsid} is not active", hint=f"active: {active}")
        return Namespace.parse(nsid, raw, self._refuse_set(nsid))

    def _refuse_set(self, nsid: int) -> int:
        """The command set of `nsid`, or Unsupported for one without blocks."""
        found = self.command_set(nsid)
        if found not in (0, 2):
            name = COMMAND_SETS.get(found, str(found))
            raise Unsupported(f"namespace {nsid} is of the {name} command set: it has no blocks")
        return found

    def command_set(self, nsid: int) -> int:
        """Which command set a namespace is of (`COMMAND_SETS`), from its descriptors (5.17.2.3)."""
        if not self.registers.configuration.field("command_set"):
            return 0
        try:
            raw = self.identify(nvme_spec.CNS_DESCRIPTORS, nsid)
        except KernelError:
            self.health.refuse()
            return 0  # not told: the NVM command set, as before there were others
        return command_set_of(raw)

    def enable_interrupts(self, count: int) -> None:
        """Have `count` MSI-X vectors on, or more; vector 0 is the admin queue's, which is polled.
        They are turned off when the controller is closed."""
        on = self.interrupts[0].owner if self.interrupts else None
        if on is None or on.closed:
            on = self.device.irqs.msix(count)
        elif count > len(on):
            on.add(count - len(on))
        self.interrupts = list(on.vectors)

    def create_queue(
        self,
        entries: int | None = None,
        *,
        vector: int | None = None,
        priority: str = "urgent",
        in_memory_buffer: bool = False,
    ) -> IoQueue:
        """A new pair of I/O queues (5.4, 5.5) for up to `entries` - 1 commands in flight (as many
        as the controller takes, but no more than 128 entries, where left out); polled, or
        signalled by MSI-X `vector`, which is then this queue's alone; of a `priority` other than
        urgent only where they are `weighted`; its submission queue `in_memory_buffer`, which is
        Unsupported where the controller has none that takes it. Raises UsageError where there is
        no room for more queues, KernelError (ENOSPC) where there is none in the buffer."""
        self.health.refuse_child()
        self.health.refuse()
        if priority not in nvme_spec.PRIORITIES or not (self._weighted or priority == "urgent"):
            raise UsageError(
                f"no queue of priority {priority!r} on {self.device.name}",
                hint=f"{', '.join(nvme_spec.PRIORITIES)}, of a Controller(device, weighted=True)",
            )
        with self._making:
            taken = {*self.queues, *(queue.number for queue in self._undead)}
            number = next(n for n in range(1, 0xFFFF) if n not in taken)
            limit = self._capabilities["queue_entries"] + 1
            entries = min(QUEUE_ENTRIES, limit) if entries is None else entries
            if number > self.queue_limit or not 2 <= entries <= limit:
                raise UsageError(
                    f"{self.device.name} takes {self.queue_limit} queue pairs of 2 to {limit} "
                    "entries"
                )
            interrupt = self._vector(vector)
            completions = entries if interrupt else min(limit, max(1024, 2 * entries))
            rings = self._rings(
                number,
                entries,
                completions,
                lists=True,
                lazy=interrupt is None,
                placed=in_memory_buffer,
            )
            try:
                create_pair(self.admin, rings, vector, priority)
                pair = QueuePair(rings, self._doorbells(number))
            except VfiotoolError:
                self._free(*rings.buffers)
                raise
            commands = InFlight(pair, self.health, interrupt)
            queue = IoQueue(commands, self.device, self.max_transfer, self.delete_queue)
            queue.priority = priority
            self.queues[number] = queue
            return queue

    def _vector(self, vector: int | None) -> Interrupt | None:
        if vector is None:
            return None
        if not 0 <= vector < len(self.interrupts):
            raise UsageError(f"vector {vector} of {len(self.interrupts)} that are on")
        interrupt = self.interrupts[vector]
        for queue in self.queues.values():
            if queue.interrupt is interrupt:
                raise UsageError(
                    f"vector {vector} signals queue {queue.number} already",
                    hint="a vector for each queue: enable_interrupts with more",
                )
        return interrupt

    def delete_queue(self, queue: IoQueue, timeout_s: float | None = None) -> None:
        """End a pair of I/O queues (5.6, 5.7); what was in flight does not come back. Where the
        controller does not answer its memory is kept until `reset` or `close`."""
        self.health.refuse_child()
        with self._making:
            number = queue.number
            queue.closed = True
            queue.pair.stop(abandon=self.health.failure is not None)
            if self.queues.pop(number, None) is None:
                return
            self._turn_out(queue, Deadline(_LEAVE_S))
            try:
                delete_pair(self.admin, number, timeout_s)
            except VfiotoolError:
                self._undead.append(queue)
                raise
            self._bury(queue)

    def _turn_out(self, queue: IoQueue, deadline: Deadline) -> None:
        """Until the thread that was using a stopped queue has seen that and left. One that holds
        it without a call, as an AsyncQueue does, is not waited for longer than the deadline."""
        told = UsageError(f"queue {queue.number} is closed")
        with contextlib.suppress(UsageError), queue.commands.taken_over(deadline, told):
            pass

    def _bury(self, queue: IoQueue) -> None:
        """Give back the memory of a queue that the controller does not know any more."""
        queue.commands.drop()
        queue.pair.close()
        queue.free_bounce()
        self._free(*queue.pair.rings.buffers)

    def reset(self, *, resubmit: bool = False) -> None:
        """Disable the controller and bring it up again (3.7.2), from any thread: its queues and
        interrupts are as before. InFlight that were in flight end with the status "aborted by the
        host" (type 3, code 71h), or with `resubmit` are sent once more, in each queue's order
        (only where doing one twice is harmless).

        The remedy after a time-out or a fatal status. Raises KernelError where the controller does
        not come up, and stays failed then.
        """
        self.health.refuse_child()
        if self._closed:
            raise UsageError(f"the controller {self.device.name} is closed")
        with self._making, contextlib.ExitStack() as stack:
            self.health.tell("it is being reset")
            every = [self._commands, *(queue.commands for queue in self.queues.values())]
            for commands in every:
                commands.pair.stop(abandon=True)
            try:
                leave, told = Deadline(_TOLD_S), self.health.error("it is being reset")
                for commands in every:
                    stack.enter_context(commands.taken_over(leave, told))
                self._restart(every)
                self.health.tell(None)
                self._come_back(resubmit=resubmit)
            except VfiotoolError as error:
                self.health.tell(f"its reset failed: {error.message}")
                raise

    def _restart(self, every: list[InFlight]) -> None:
        try:
            self._disable(_DISABLE_S)
        except KernelError as error:
            if "gone" in error.message or not self.device.info.has_reset:
                raise
            self.device.reset()  # what does not obey CC.EN may obey FLR
        for commands in every:
            commands.pair.restart()
            commands.settle()  # what had come before is told as it came
        for queue in self._undead:
            self._bury(queue)
        self._undead.clear()
        self._enable()

    def _come_back(self, *, resubmit: bool) -> None:
        self._commands.after_reset(resubmit=False)
        self._ask_queues()
        if self._shadows is not None:
            self._set_doorbell_buffers()
        for queue in self.queues.values():
            vectors = {id(one): number for number, one in enumerate(self.interrupts)}
            vector = vectors.get(id(queue.interrupt))
            create_pair(self.admin, queue.pair.rings, vector, queue.priority)
        for queue in self.queues.values():
            queue.commands.after_reset(resubmit=resubmit)

    def close(self) -> None:
        """Shut the controller down (3.6.1), disable it, free its memory, turn its interrupts off.
        Closing twice is nothing, and so it is in a child process. With a controller that does not
        answer it takes at most 15 s.

        Raises KernelError, after all of it, where the controller did not finish its shutdown: what
        its write cache held may be lost.
        """
        if self._closed or (hasattr(self, "health") and self.health.in_child):
            return
        status = self._status()
        reachable = status not in (None, ALL_ONES)
        mute = bool(status is None or status & 2 or not status & 1)
        if reachable and not mute:
            mute = self._end_queues()
        self._closed = True
        if hasattr(self, "health"):
            self.health.closed = True
        problem: KernelError | None = None
        stopped = status == ALL_ONES
        leave = Deadline(_LEAVE_S)
        for queue in self.queues.values():
            queue.closed = True
            queue.pair.stop(abandon=True)
            self._turn_out(queue, leave)
        if hasattr(self, "_admin"):
            self._admin.stop(abandon=True)
        if reachable:
            told_s = self.identity.shutdown_s if hasattr(self, "identity") and not mute else 0.0
            # As long as RTD3E says (5.17.2.1), within bounds.
            wait_s = min(max(told_s, _SHUTDOWN_S), _SHUTDOWN_LIMIT_S)
            problem = self.health.shut_down(wait_s)
            with contextlib.suppress(VfiotoolError):
                self._disable(_DISABLE_S if mute else None)
                stopped = True
        if not stopped:
            # It may still write to memory: not through a bridge that does not let it.
            with contextlib.suppress(VfiotoolError):
                self.device.set_bus_master(False)
                stopped = True
        self._let_go(stopped)
        if problem is not None:
            raise problem

    def _status(self) -> int | None:
        try:
            return self.registers.status.read()
        except VfiotoolError:
            return None

    def _let_go(self, stopped: bool) -> None:
        if getattr(self, "interrupts", None):
            with contextlib.suppress(VfiotoolError):
                self.interrupts[0].owner.close()
        for queue in (*self.queues.values(), *getattr(self, "_undead", ())):
            queue.commands.drop()
            queue.pair.close()
            if stopped:
                queue.free_bounce()
        if hasattr(self, "_admin"):
            self._commands.drop()
            self._admin.close()
        if stopped:
            self._free(*list(self._buffers))
        self._memory.close(stopped)

    def _end_queues(self) -> bool:
        """Let what is in flight end, then delete the queues, as 3.6.1 has it before a shutdown;
        whether the controller did not answer: then nothing further is asked of it.
        It matters: QEMU 10.0 reads freed memory when it is disabled with commands unfetched."""
        deadline = Deadline(_DRAIN_S)
        for queue in list(self.queues.values()):
            with contextlib.suppress(VfiotoolError):
                queue.drain(deadline.left())
        deadline = Deadline(_DELETE_S)
        for queue in list(self.queues.values()):
            try:
                self.delete_queue(queue, deadline.left())
            except VfiotoolError as error:
                if error.errno_name is not None or self.health.failure is not None:
                    return True
        return False

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
            return
        # The error of the block is the one that is told.
        with contextlib.suppress(VfiotoolError):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.health.failure or f"{len(self.queues)} queues"
        return f"<Controller {self.device.name}: {state}>"
