"""The vhost-user back end: what each message does to a device's state.

One `Frontend` is one connection. It owns what the front end handed over (memory, eventfds, logs)
and the queues that run from it, and gives all of it back when the connection ends, however it ends.
Queues run in workers; what is here only starts, stops and changes them.

A ring starts when its kick arrives and it is enabled, and stops at GET_VRING_BASE
(QEMU docs/interop/vhost-user.rst, "Ring states").
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from vfiotool.errors import Refused, VfiotoolError
from vfiotool.native.virtqueue import (
    MEMORY_ROOM,
    MemoryMap,
    MemoryRegion,
    RingLayout,
    Worker,
    WrittenPages,
    log_bytes,
)
from vfiotool.virtio.message import (
    CONFIG_BYTES,
    BackendRequest,
    InflightArea,
    ProtocolError,
    ProtocolFeature,
    VhostMessage,
    VhostRequest,
    format_backend_request,
    format_config,
    format_inflight,
    format_reply,
    format_state,
    format_u64,
    parse_addresses,
    parse_config,
    parse_inflight,
    parse_log,
    parse_memory_table,
    parse_one_region,
    parse_state,
    parse_u64,
    parse_vring_descriptor,
)
from vfiotool.virtio.served import QueueStart, ServedDevice, VirtioFeature, Vring

# What QEMU may plug in at most; each is one mapping of ours.
MEMORY_SLOTS = 509
LARGEST_QUEUE = 1024
# Of SET_VRING_ADDR's flags (VHOST_VRING_F_LOG).
_LOG_RING = 1


PROTOCOL_FEATURES = sum(1 << feature for feature in ProtocolFeature)
_TRANSPORT = (
    VirtioFeature.LOG_ALL
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.PROTOCOL_FEATURES
    | VirtioFeature.VERSION_1
)


class Frontend:
    """One front end's connection to a device, whose queues may run in `workers`.

    `handle` takes one message and returns the reply, if one is due, and a descriptor to send.
    A request that cannot be done is answered with an error where the protocol has one (REPLY_ACK),
    and ends the connection with ProtocolError where it has none.
    """

    def __init__(
        self,
        device: ServedDevice,
        workers: list[Worker],
        may_run: Callable[[Frontend], bool] = lambda _: True,
        room: Callable[[], int] = lambda: MEMORY_ROOM,
    ) -> None:
        self._may_run = may_run
        # How many memory regions more its tenant may have mapped.
        self._room = room
        self.device = device
        self.workers = workers
        self.features = 0
        self.protocol_features = 0
        self.vrings = [Vring() for _ in range(device.queues)]
        self.regions: list[MemoryRegion] = []
        self.memory: MemoryMap | None = None
        self.log: MemoryMap | None = None
        self.log_area: InflightArea | None = None
        # The descriptor is kept for a process that takes this one's place.
        self.log_fd: int | None = None
        self.dirty: MemoryMap | None = None
        self.dirty_bytes = self.dirty_offset = 0
        self.dirty_fd: int | None = None
        self.channel: socket.socket | None = None

    @property
    def is_running(self) -> bool:
        return any(vring.queue is not None for vring in self.vrings)

    @property
    def mapped(self) -> int:
        """Memory regions that it has mapped here."""
        logs = (self.log is not None) + (self.dirty is not None)
        return logs + (len(self.regions) if self.memory is not None else 0)

    def offered(self) -> int:
        return int(self.device.features() | _TRANSPORT)

    def handle(self, message: VhostMessage) -> tuple[bytes, int | None] | None:
        """Do what a message asks. The message's descriptors are taken or closed."""
        try:
            answer = _HANDLERS[message.request](self, message)
        except ProtocolError:
            raise
        except (VfiotoolError, OSError) as error:
            if not self._acknowledges(message) or message.request in _ANSWERED:
                raise ProtocolError(f"{message.request.name}: {error}") from error
            return format_reply(message.request, format_u64(1)), None
        finally:
            message.close()
        if answer is not None:
            payload, descriptor = answer
            return format_reply(message.request, payload), descriptor
        if self._acknowledges(message):
            return format_reply(message.request, format_u64(0)), None
        return None

    def _negotiated(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    def _acknowledges(self, message: VhostMessage) -> bool:
        return message.needs_reply and self._negotiated(ProtocolFeature.REPLY_ACK)

    def broken(self) -> list[str]:
        """Why queues serve no more."""
        found = []
        for index, vring in enumerate(self.vrings):
            if vring.queue is not None and (why := vring.queue.broken()):
                found.append(f"queue {index}: {why}")
        return found

    def config_changed(self) -> bool:
        """Tell the driver that the configuration changed; whether there is a way to."""
        if self.channel is None:
            return False
        with suppress(OSError):
            # A front end that does not read its channel must not stop us.
            data = format_backend_request(BackendRequest.CONFIG_CHANGE)
            return self.channel.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
        return False

    def close(self) -> list[str]:
        """Stop all queues, after what they fetched, and give everything back. What a queue keeps
        that did not stop is its own; returns why."""
        failed = []
        for index, vring in enumerate(self.vrings):
            try:
                self._stop(vring)
            except Exception as error:
                why = error.message if isinstance(error, VfiotoolError) else repr(error)
                failed.append(f"queue {index} does not stop: {why}")
            vring.close()
        self._set_regions([])
        if self.memory is not None:
            self.device.leave(self.memory)
            self.memory = None
        self._drop_log()
        self._set_dirty(None, 0, 0, None)
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        return failed

    # Queues

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ProtocolError(f"vring {index} of {len(self.vrings)}")
        return self.vrings[index]

    def _run(self, index: int) -> None:
        """Start a ring that has all it needs; one that runs already goes on."""
        vring = self.vrings[index]
        if vring.queue is not None or not vring.kicked or not vring.enabled:
            return
        if self.memory is None or vring.addresses is None or not vring.size:
            raise ProtocolError(f"vring {index} starts before its memory, size and addresses")
        if not self._may_run(self):
            raise ProtocolError("another front end runs this device")
        layout = RingLayout(
            vring.addresses.descriptors,
            vring.addresses.available,
            vring.addresses.used,
            vring.size,
            event_index=bool(self.features & VirtioFeature.EVENT_IDX),
            indirect=bool(self.features & VirtioFeature.INDIRECT_DESC),
            packed=self._is_packed,
        )
        vring.queue = self.device.start_queue(
            self.workers,
            index,
            self.features,
            QueueStart(
                self.memory,
                layout,
                vring.base,
                kick=vring.kick,
                call=vring.call,
                error=vring.error,
                log=self._log_of(index, vring.size),
                dirty=self._dirty_log_of(vring),
            ),
        )

    def _stop(self, vring: Vring, *, suspend: bool = False) -> None:
        if vring.queue is not None:
            queue, vring.queue = vring.queue, None
            vring.base = queue.suspend() if suspend else queue.stop()

    def _log_of(self, index: int, size: int) -> tuple[MemoryMap, int] | None:
        if self.log is None or self.log_area is None:
            return None
        if index >= self.log_area.queues or size != self.log_area.queue_size:
            raise ProtocolError(f"vring {index} of {size} entries is not in the in-flight area")
        step = log_bytes(size, packed=self._is_packed)
        if self.log_area.size < self.log_area.queues * step:
            raise ProtocolError(f"an in-flight area of {self.log_area.size} bytes is too small")
        return self.log, index * step

    @property
    def _is_packed(self) -> bool:
        return bool(self.features & VirtioFeature.RING_PACKED)

    def _dirty_log_of(self, vring: Vring) -> WrittenPages | None:
        if self.dirty is None or not self.features & VirtioFeature.LOG_ALL:
            return None
        addresses = vring.addresses
        logged = addresses is not None and addresses.flags & _LOG_RING
        ring = addresses.log if addresses is not None and logged else None
        return WrittenPages(self.dirty, self.dirty_bytes, ring)

    def _log_again(self) -> None:
        """Have running queues log as the features, the log and their addresses say now."""
        for vring in self.vrings:
            if vring.queue is not None:
                vring.queue.set_dirty_log(self._dirty_log_of(vring))

    # Memory

    def _set_regions(self, regions: list[MemoryRegion]) -> None:
        """Own these regions from now on, and close the descriptors of those that went."""
        kept = {region.fd for region in regions}
        for region in self.regions:
            if region.fd not in kept:
                os.close(region.fd)
        self.regions = regions

    def _publish(self, regions: list[MemoryRegion], message: VhostMessage | None = None) -> None:
        """Map these regions and put them under the running queues; nothing changes on an error, but
        for a queue's own, which comes when all is done. The regions' descriptors are those of
        `message`, and ours with the change."""
        fresh = self._mapped(regions) if regions else None
        self._set_regions(regions)
        if message is not None:
            message.descriptors.clear()
        old, self.memory = self.memory, fresh
        try:
            for vring in self.vrings:
                if fresh is None:
                    self._stop(vring)
                elif vring.queue is not None:
                    vring.queue.set_memory(fresh)
        finally:
            if old is not None:
                self.device.leave(old)

    def _map(self, regions: list[MemoryRegion]) -> MemoryMap:
        if len(regions) > self._room():
            raise Refused(f"{len(regions)} memory regions are more than its share")
        return MemoryMap(regions)

    def _mapped(self, regions: list[MemoryRegion]) -> MemoryMap:
        fresh = self._map(regions)
        try:
            self.device.reach(fresh, regions)
        except BaseException:
            fresh.close()
            raise
        return fresh

    def _drop_log(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.log_fd is not None:
            os.close(self.log_fd)
        self.log, self.log_area, self.log_fd = None, None, None

    def set_log(self, area: InflightArea, descriptor: int) -> None:
        """Keep the in-flight logs there from now on; the descriptor is ours once this returns."""
        fresh = self._map([MemoryRegion(0, 0, area.size, area.offset, descriptor)])
        self._drop_log()
        self.log, self.log_area, self.log_fd = fresh, area, descriptor

    def set_dirty_log(self, size: int, offset: int, descriptor: int) -> None:
        """Log written pages there from now on; the descriptor is ours once this returns."""
        fresh = self._map([MemoryRegion(0, 0, size, offset, descriptor)])
        self._set_dirty(fresh, size, offset, descriptor)

    def _set_dirty(
        self, fresh: MemoryMap | None, size: int, offset: int, descriptor: int | None
    ) -> None:
        old, old_fd = self.dirty, self.dirty_fd
        self.dirty, self.dirty_bytes, self.dirty_offset = fresh, size, offset
        self.dirty_fd = descriptor
        self._log_again()
        if old is not None:
            old.close()
        if old_fd is not None:
            os.close(old_fd)

    # A process that takes this one's place

    def set_memory(self, regions: list[MemoryRegion]) -> None:
        """Map these regions; their descriptors are ours once this returns."""
        self._publish(regions)

    def pause(self) -> None:
        """Stop the queues that run, after what they fetched, and remember which."""
        for vring in self.vrings:
            vring.paused = vring.queue is not None
            self._stop(vring)

    def resume(self) -> None:
        """Start those that `pause` stopped. Raises what starting them does."""
        for index, vring in enumerate(self.vrings):
            if vring.paused:
                vring.paused = False
                self._run(index)

    # Messages

    def _get_features(self, _: VhostMessage) -> tuple[bytes, None]:
        return format_u64(self.offered()), None

    def _set_features(self, message: VhostMessage) -> None:
        wanted = parse_u64(message.payload)
        if unknown := wanted & ~self.offered():
            raise ProtocolError(f"features {unknown:#x} were not offered")
        self.features = wanted
        if not wanted & VirtioFeature.PROTOCOL_FEATURES:
            for vring in self.vrings:
                vring.enabled = True
        # Sent again while the rings run when a migration begins and when it is given up.
        self._log_again()

    def _nothing(self, _: VhostMessage) -> None:
        """SET_OWNER; RESET_OWNER, by which front ends no longer mean anything; SET_LOG_FD, which is
        signalled by nobody: the log is read when the front end wants to."""

    def _get_protocol_features(self, _: VhostMessage) -> tuple[bytes, None]:
        return format_u64(PROTOCOL_FEATURES), None

    def _set_protocol_features(self, message: VhostMessage) -> None:
        wanted = parse_u64(message.payload)
        if unknown := wanted & ~PROTOCOL_FEATURES:
            raise ProtocolError(f"protocol features {unknown:#x} were not offered")
        self.protocol_features = wanted

    def _get_queue_num(self, _: VhostMessage) -> tuple[bytes, None]:
        return format_u64(len(self.vrings)), None

    def _get_max_mem_slots(self, _: VhostMessage) -> tuple[bytes, None]:
        # Another map is made beside the one that is there.
        return format_u64(min(MEMORY_SLOTS, max(1, (self._room() - self.mapped) // 2 - 2))), None

    def _set_mem_table(self, message: VhostMessage) -> None:
        self._publish(parse_memory_table(message), message)

    def _add_mem_reg(self, message: VhostMessage) -> None:
        if len(self.regions) >= MEMORY_SLOTS:
            raise ProtocolError(f"more than {MEMORY_SLOTS} memory slots")
        self._publish([*self.regions, parse_one_region(message)], message)

    def _rem_mem_reg(self, message: VhostMessage) -> None:
        gone = parse_one_region(message)
        for region in self.regions:
            if (region.guest, region.user, region.size) == (gone.guest, gone.user, gone.size):
                self._publish([other for other in self.regions if other is not region])
                return
        raise ProtocolError(f"no memory region at {gone.guest:#x} to remove")

    def _set_log_base(self, message: VhostMessage) -> tuple[bytes, None]:
        size, offset = parse_log(message.payload)
        try:
            self.set_dirty_log(size, offset, message.descriptors[0])
        finally:
            if self.dirty_fd in message.descriptors:
                message.descriptors.clear()
        return format_u64(0), None

    def _set_vring_num(self, message: VhostMessage) -> None:
        index, size = parse_state(message.payload)
        vring = self._vring(index)
        if not 0 < size <= LARGEST_QUEUE or size & (size - 1):
            raise ProtocolError(f"vring {index} of {size} entries")
        self._needs_stopped(index, vring)
        vring.size = size

    def _set_vring_addr(self, message: VhostMessage) -> None:
        addresses = parse_addresses(message.payload)
        vring = self._vring(addresses.index)
        # Sent again while it runs when dirty logging is switched; the ring's place stays.
        same = replace(addresses, flags=0, log=0)
        if vring.queue is not None and same != replace(vring.addresses or same, flags=0, log=0):
            raise ProtocolError(f"vring {addresses.index} is moved while it runs")
        vring.addresses = addresses
        self._log_again()

    def _set_vring_base(self, message: VhostMessage) -> None:
        index, base = parse_state(message.payload)
        vring = self._vring(index)
        # A packed ring's has the place of the used descriptor above that of the available one.
        if base > 0xFFFF and not self._is_packed:
            raise ProtocolError(f"vring {index} begins at {base}")
        self._needs_stopped(index, vring)
        vring.base = base

    def _needs_stopped(self, index: int, vring: Vring) -> None:
        if vring.queue is not None:
            raise ProtocolError(f"vring {index} is changed while it runs")

    def _get_vring_base(self, message: VhostMessage) -> tuple[bytes, None]:
        # Whether a stop may leave requests to the in-flight log was one bit's meaning first (QEMU
        # 11.0) and is a message of its own where both sides know that.
        leaves = self._negotiated(ProtocolFeature.GET_VRING_BASE_INFLIGHT)
        if self._negotiated(ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN):
            leaves = False
        return self._end_ring(message, suspend=leaves)

    def _get_vring_base_skip_drain(self, message: VhostMessage) -> tuple[bytes, None]:
        if not self._negotiated(ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN):
            raise ProtocolError("GET_VRING_BASE_SKIP_DRAIN was not negotiated")
        return self._end_ring(message, suspend=True)

    def _end_ring(self, message: VhostMessage, *, suspend: bool) -> tuple[bytes, None]:
        index, _ = parse_state(message.payload)
        vring = self._vring(index)
        self._stop(vring, suspend=suspend)
        vring.kicked = False
        if vring.kick is not None:
            os.close(vring.kick)
            vring.kick = None
        return format_state(index, vring.base), None

    def _set_vring_kick(self, message: VhostMessage) -> None:
        index, descriptor = self._vring_descriptor(message)
        if descriptor is None:
            raise ProtocolError(f"vring {index} without a kick would have to be polled for ever")
        vring = self._vring(index)
        # A ring that gets another kick is started anew behind what it has done.
        self._stop(vring)
        if vring.kick is not None:
            os.close(vring.kick)
        vring.kick, vring.kicked = descriptor, True
        self._run(index)

    def _set_vring_call(self, message: VhostMessage) -> None:
        index, descriptor = self._vring_descriptor(message)
        vring = self._vring(index)
        if vring.call is not None:
            os.close(vring.call)
        vring.call = descriptor
        if vring.queue is not None:
            vring.queue.set_call(descriptor)

    def _set_vring_err(self, message: VhostMessage) -> None:
        index, descriptor = self._vring_descriptor(message)
        vring = self._vring(index)
        if vring.error is not None:
            os.close(vring.error)
        vring.error = descriptor

    def _vring_descriptor(self, message: VhostMessage) -> tuple[int, int | None]:
        """The vring and the descriptor that comes with it, which is the caller's from now on."""
        index, has_descriptor = parse_vring_descriptor(message.payload)
        self._vring(index)
        if has_descriptor != bool(message.descriptors):
            raise ProtocolError(f"{message.request.name}: the descriptor does not fit its flag")
        return index, message.take_eventfd() if has_descriptor else None

    def _set_vring_enable(self, message: VhostMessage) -> None:
        index, enabled = parse_state(message.payload)
        vring = self._vring(index)
        vring.enabled = bool(enabled)
        if enabled:
            self._run(index)
        else:
            self._stop(vring)

    def _set_backend_req_fd(self, message: VhostMessage) -> None:
        try:
            channel = socket.socket(fileno=message.descriptors[0])
        except OSError as error:
            raise ProtocolError(f"the back end's channel is not a socket: {error}") from error
        message.descriptors.clear()
        if self.channel is not None:
            self.channel.close()
        self.channel = channel

    def _get_config(self, message: VhostMessage) -> tuple[bytes, None]:
        offset, size, _ = parse_config(message.payload)
        whole = self.device.config().ljust(CONFIG_BYTES, b"\0")
        return format_config(offset, whole[offset : offset + size]), None

    def _set_config(self, message: VhostMessage) -> None:
        offset, _, data = parse_config(message.payload)
        self.device.write_config(offset, data)

    def _get_inflight_fd(self, message: VhostMessage) -> tuple[bytes, int]:
        asked = parse_inflight(message.payload)
        if not 0 < asked.queues <= len(self.vrings) or not self._is_size(asked.queue_size):
            raise ProtocolError(f"an in-flight area for {asked.queues} x {asked.queue_size}")
        size = asked.queues * log_bytes(asked.queue_size, packed=self._is_packed)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        descriptor = os.memfd_create("vhost-user-inflight", flags)
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        return format_inflight(replace(asked, size=size, offset=0)), descriptor

    def _set_inflight_fd(self, message: VhostMessage) -> None:
        area = parse_inflight(message.payload)
        if not self._is_size(area.queue_size) or not area.queues:
            raise ProtocolError(f"an in-flight area for {area.queues} x {area.queue_size}")
        if area.size < area.queues * log_bytes(area.queue_size, packed=self._is_packed):
            raise ProtocolError(f"an in-flight area of {area.size} bytes is too small")
        if any(vring.queue is not None for vring in self.vrings):
            raise ProtocolError("the in-flight area is changed while rings run")
        self.set_log(area, message.descriptors[0])
        message.descriptors.clear()

    @staticmethod
    def _is_size(size: int) -> bool:
        return 0 < size <= LARGEST_QUEUE and not size & (size - 1)


_Handler = Callable[[Frontend, VhostMessage], tuple[bytes, int | None] | None]
_HANDLERS: dict[VhostRequest, _Handler] = {
    VhostRequest.GET_FEATURES: Frontend._get_features,
    VhostRequest.SET_FEATURES: Frontend._set_features,
    VhostRequest.SET_OWNER: Frontend._nothing,
    VhostRequest.RESET_OWNER: Frontend._nothing,
    VhostRequest.SET_MEM_TABLE: Frontend._set_mem_table,
    VhostRequest.SET_LOG_BASE: Frontend._set_log_base,
    VhostRequest.SET_LOG_FD: Frontend._nothing,
    VhostRequest.SET_VRING_NUM: Frontend._set_vring_num,
    VhostRequest.SET_VRING_ADDR: Frontend._set_vring_addr,
    VhostRequest.SET_VRING_BASE: Frontend._set_vring_base,
    VhostRequest.GET_VRING_BASE: Frontend._get_vring_base,
    VhostRequest.SET_VRING_KICK: Frontend._set_vring_kick,
    VhostRequest.SET_VRING_CALL: Frontend._set_vring_call,
    VhostRequest.SET_VRING_ERR: Frontend._set_vring_err,
    VhostRequest.GET_PROTOCOL_FEATURES: Frontend._get_protocol_features,
    VhostRequest.SET_PROTOCOL_FEATURES: Frontend._set_protocol_features,
    VhostRequest.GET_QUEUE_NUM: Frontend._get_queue_num,
    VhostRequest.SET_VRING_ENABLE: Frontend._set_vring_enable,
    VhostRequest.SET_BACKEND_REQ_FD: Frontend._set_backend_req_fd,
    VhostRequest.GET_CONFIG: Frontend._get_config,
    VhostRequest.SET_CONFIG: Frontend._set_config,
    VhostRequest.GET_INFLIGHT_FD: Frontend._get_inflight_fd,
    VhostRequest.SET_INFLIGHT_FD: Frontend._set_inflight_fd,
    VhostRequest.GET_MAX_MEM_SLOTS: Frontend._get_max_mem_slots,
    VhostRequest.ADD_MEM_REG: Frontend._add_mem_reg,
    VhostRequest.REM_MEM_REG: Frontend._rem_mem_reg,
    VhostRequest.GET_VRING_BASE_SKIP_DRAIN: Frontend._get_vring_base_skip_drain,
}
# Those with an answer of their own, which has no room for an error.
_ANSWERED = frozenset(
    request
    for request in VhostRequest
    if request.name.startswith("GET_") or request is VhostRequest.SET_LOG_BASE
)
