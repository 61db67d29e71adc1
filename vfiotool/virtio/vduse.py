"""The VDUSE back end: a device for this host's kernel, or for a VM over vhost-vdpa.

The kernel's part stays when this process ends: `/dev/vduse/NAME` waits for the next one, which goes
on with the requests that the in-flight log says were begun. So the log is a file, and it is opened
again by name.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from vfiotool.errors import KernelError, NotFound, Refused, Unsupported, VfiotoolError, from_oserror
from vfiotool.host.paths import DEV_VDUSE
from vfiotool.native.virtqueue import MemoryMap, MemoryRegion, RingLayout, Worker, log_bytes
from vfiotool.virtio import vduse_wire as wire
from vfiotool.virtio.served import QueueStart, RunningQueue, ServedDevice, VirtioFeature
from vfiotool.virtio.vduse_wire import VduseRequest, VduseRequestType

QUEUE_SIZE = 256
_DRIVER_OK = 4
_ACCESS_PLATFORM = 1 << 33
_FEATURES = (
    _ACCESS_PLATFORM
    | VirtioFeature.VERSION_1
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.INDIRECT_DESC
)
# How long udev may take to make a node.
_NODE_S = 5.0

Report = Callable[[str], None]


def open_control() -> tuple[int, int]:
    """VDUSE's control node, opened, and the API version agreed on. Raises Unsupported
    without the module, NotPermitted."""
    try:
        control = os.open(f"{DEV_VDUSE}/control", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unsupported(
            "this kernel has no VDUSE (CONFIG_VDPA_USER)", hint="modprobe vduse"
        ) from None
    except OSError as error:
        raise from_oserror(f"open {DEV_VDUSE}/control", error) from error
    try:
        return control, wire.set_api_version(control)
    except BaseException:
        os.close(control)
        raise


class VduseDevice:
    """A device that a process serves over VDUSE. Opened anew or, if it is there, taken up again.

    `log` is the in-flight log's file. Raises Unsupported, NotPermitted, Refused if another process
    serves it. `run` serves until `stop`.
    """

    def __init__(
        self,
        name: str,
        device: ServedDevice,
        device_id: int,
        workers: list[Worker],
        *,
        log: str,
        report: Report,
        must_exist: bool = False,
    ) -> None:
        """`must_exist` takes up what is there and makes nothing (NotFound)."""
        self.name, self.device, self.workers = name, device, workers
        self._report = report
        self._queues: dict[int, RunningQueue] = {}
        self._kicks: dict[int, int] = {}
        self._bases: dict[int, int] = {}
        self._regions: list[MemoryRegion] = []
        self._memory: MemoryMap | None = None
        self._ending = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Written by queues that break.
        self._fault = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._watched: dict[socket.socket, Callable[[], None]] = {}
        control, version = open_control()
        try:
            self.is_new = not must_exist and self._create(control, version, device_id)
            self._fd = self._open()
            try:
                if self.is_new:
                    for index in range(device.queues):
                        wire.setup_queue(self._fd, index, QUEUE_SIZE)
                self._log = self._open_log(log)
            except BaseException:
                os.close(self._fd)
                if self.is_new:
                    with suppress(VfiotoolError):
                        wire.destroy(control, name)
                raise
        finally:
            os.close(control)

    def _create(self, control: int, version: int, device_id: int) -> bool:
        # Split rings, whose progress stands in memory that the next server reads.
        features = (self.device.features() & ~VirtioFeature.RING_PACKED) | _FEATURES
        try:
            wire.create(
                control,
                self.name,
                device_id,
                features,
                self.device.queues,
                self.device.config(),
                version=version,
            )
        except KernelError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def _open(self) -> int:
        path, ends = f"{DEV_VDUSE}/{self.name}", time.monotonic() + _NODE_S
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError as error:
                if not self.is_new:
                    raise NotFound(f"there is no VDUSE device {self.name}") from error
                if time.monotonic() > ends:
                    raise from_oserror(f"open {path}", error) from error
                time.sleep(0.01)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise Refused(f"{self.name} is served by another process") from error
                raise from_oserror(f"open {path}", error) from error

    def _open_log(self, path: str) -> MemoryMap:
        """The in-flight log. One that was left by a device of the same name that is no more is
        begun anew."""
        size = self.device.queues * log_bytes(QUEUE_SIZE)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_TRUNC if self.is_new else 0
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise from_oserror(f"open {path}", error) from error
        try:
            if os.fstat(descriptor).st_size < size:
                os.ftruncate(descriptor, size)
            found = MemoryMap([MemoryRegion(0, 0, size, 0, descriptor)])
        except OSError as error:
            os.close(descriptor)
            raise from_oserror(f"prepare {path}", error) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._log_fd, self._log_bytes = descriptor, size
        return found

    def run(self) -> None:
        """Serve until `stop` is called. A driver that is there already goes on at once."""
        if not self.is_new:
            self._try(self._start)
        selector = self._selector
        for descriptor in (self._fd, self._wake, self._fault):
            selector.register(descriptor, selectors.EVENT_READ)
        while not self._ending:
            for key, _ in selector.select():
                if key.fd == self._fd:
                    self._message()
                elif key.fd == self._fault:
                    os.eventfd_read(self._fault)
                    self._try(self._look_again)
                elif isinstance(key.fileobj, socket.socket):
                    # It may have been taken away by one that came with it.
                    self._watched.get(key.fileobj, lambda: None)()

    def _try(self, action: Callable[[], None]) -> None:
        """What a driver has set up wrongly is reported, and ends nothing but its queues."""
        try:
            action()
        except (VfiotoolError, OSError) as error:
            self._report(f"{self.name}: {getattr(error, 'message', error)}")

    def watch(self, source: socket.socket, action: Callable[[], None]) -> None:
        """Have `run` call `action` whenever the socket can be read."""
        self._watched[source] = action
        self._selector.register(source, selectors.EVENT_READ)

    def unwatch(self, source: socket.socket) -> None:
        """End what `watch` began."""
        del self._watched[source]
        self._selector.unregister(source)

    def stop(self) -> None:
        """End `run`; from another thread or a signal handler."""
        self._ending = True
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def resize(self) -> bool:
        """Take the size of what is behind it anew, and tell the driver; whether it changed."""
        if not self.device.resize():
            return False
        wire.set_config(self._fd, self.device.config())
        return True

    def close(self) -> None:
        """End the queues after what they have begun. The kernel's device stays; see `destroy`."""
        self._stop()
        self._log.close()
        os.close(self._log_fd)
        self._selector.close()
        os.close(self._fd)
        os.close(self._wake)
        os.close(self._fault)

    def remove_unused(self) -> bool:
        """Remove the kernel's device, after `close`; False if it is on the vDPA bus."""
        control, _ = open_control()
        try:
            wire.destroy(control, self.name)
        except KernelError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        finally:
            os.close(control)
        return True

    # Messages

    def _message(self) -> None:
        try:
            data = os.read(self._fd, 152)
        except BlockingIOError:
            return
        request = wire.parse_request(data)
        try:
            ok, base = True, self._do(request)
        except (VfiotoolError, OSError) as error:
            self._report(f"{self.name}: {getattr(error, 'message', error)}")
            ok, base = False, 0
        os.write(self._fd, wire.format_response(request, ok, base))

    def _do(self, request: VduseRequest) -> int:
        if request.type is VduseRequestType.SET_STATUS:
            if request.number & _DRIVER_OK:
                if not self._queues:
                    # A driver that begins: what the log has is of another one.
                    os.pwrite(self._log_fd, bytes(self._log_bytes), 0)
                self._start()
            elif not request.number:
                self._stop()
            return 0
        if request.type is VduseRequestType.UPDATE_IOTLB:
            if self._queues:
                self._map()
            return 0
        if request.type is VduseRequestType.SET_VQ_GROUP_ASID:
            if request.number or request.space:
                raise VfiotoolError(f"queues in address space {request.space}: there is one alone")
            return 0
        if request.type is VduseRequestType.GET_VQ_STATE:
            return self._pause(request.number)
        raise VfiotoolError(f"a request of a kind that is not known ({request.id})")

    # Queues

    def _start(self) -> None:
        """Serve the queues that the driver has made ready."""
        ready = {
            index: info
            for index in range(self.device.queues)
            if index not in self._queues and (info := wire.queue_info(self._fd, index)).ready
        }
        if not ready:
            return
        self._map()
        if self._memory is None:
            raise VfiotoolError("the driver has mapped no memory")
        features = wire.negotiated(self._fd)
        for index, info in ready.items():
            layout = RingLayout(
                info.descriptors,
                info.available,
                info.used,
                info.size,
                event_index=bool(features & VirtioFeature.EVENT_IDX),
                indirect=bool(features & VirtioFeature.INDIRECT_DESC),
            )
            kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            start = QueueStart(
                self._memory,
                layout,
                info.base,
                kick=kick,
                call=self._fd,
                error=self._fault,
                call_index=index,
                log=(self._log, index * log_bytes(QUEUE_SIZE)),
            )
            try:
                self._queues[index] = self.device.start_queue(self.workers, index, features, start)
            except BaseException:
                os.close(kick)
                raise
            self._kicks[index] = kick
            wire.set_kick(self._fd, index, kick)
            # What was kicked before there was somebody to hear it.
            os.eventfd_write(kick, 1)

    def _pause(self, index: int) -> int:
        """The queue's next available entry; a running one is stopped to know it."""
        queue = self._queues.pop(index, None)
        if queue is not None:
            self._bases[index] = queue.stop()
            with suppress(VfiotoolError):
                wire.set_kick(self._fd, index, -1)
            os.close(self._kicks.pop(index))
        return self._bases.get(index, 0)

    def _stop(self) -> None:
        for index in list(self._queues):
            self._pause(index)
        self._bases.clear()
        self._publish([])

    # Memory

    def _look_again(self) -> None:
        """Start queues anew that broke because memory was mapped since: the kernel says nothing of
        its bounce buffer, which it makes at the first request. The log has what they had begun."""
        before = {(region.guest, region.size) for region in self._regions}
        broken = {index: why for index, queue in self._queues.items() if (why := queue.broken())}
        if not broken:
            return
        self._map()
        if {(region.guest, region.size) for region in self._regions} == before:
            for index, why in broken.items():
                self._report(f"{self.name}: queue {index}: {why}")
            return
        for index in broken:
            self._pause(index)
        self._start()

    def _map(self) -> None:
        """Map what the kernel has mapped, and put it under the running queues."""
        found = wire.regions(self._fd)
        made = []
        for region in found:
            if region.writable:
                size = region.last - region.start + 1
                made.append(
                    MemoryRegion(region.start, region.start, size, region.offset, region.fd)
                )
            else:
                # Memory that a device must not write, such as ROM: a request into it is refused.
                os.close(region.fd)
        self._publish(made)

    def _publish(self, regions: list[MemoryRegion]) -> None:
        try:
            fresh = MemoryMap(regions, sized=False) if regions else None
        except BaseException:
            for region in regions:
                os.close(region.fd)
            raise
        old, self._memory = self._memory, fresh
        for queue in self._queues.values():
            if fresh is not None:
                queue.set_memory(fresh)
        if old is not None:
            old.close()
        for region in self._regions:
            os.close(region.fd)
        self._regions = regions
