"""Sockets, connections and signals: exports that front ends connect to, in one thread of control.

The control thread reads messages and never waits for one; requests run in the workers. Of an
export's front ends one at a time runs rings: another one may connect beside it and takes over when
the first has stopped, as in a live migration. What a front end does wrong ends its own connection.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from vfiotool.errors import Refused, VfiotoolError, described
from vfiotool.native.limits import UNLIMITED, WEIGHT, Rate
from vfiotool.native.virtqueue import MEMORY_ROOM, ServedQueue, Worker
from vfiotool.virtio.backend import Frontend
from vfiotool.virtio.balance import next_move
from vfiotool.virtio.block import BlockDisk
from vfiotool.virtio.exports import ExportSettings, GroupSettings
from vfiotool.virtio.listener import Spare, listen, unlink_socket
from vfiotool.virtio.message import ProtocolError, Receiver
from vfiotool.virtio.offences import Offences
from vfiotool.virtio.served import ServedDevice
from vfiotool.virtio.shares import Groups
from vfiotool.virtio.vduse_service import VduseService

Report = Callable[[str], None]
_BALANCE_S = 2.0
# Of one export: the machine that runs, the one that takes over, and some that are on their way out.
_MOST_CONNECTIONS = 8
# What a machine has whatever the limit of descriptors is.
_LEAST_REGIONS = 16


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"vfiotool: {text}\n")


@dataclass
class Connection:
    socket: socket.socket
    receiver: Receiver
    frontend: Frontend
    closed: bool = False


class Export:
    """A device behind a listening socket, behind one connection that was handed over, or by a
    `service` that brings drivers to it.

    `listener` belongs to the export from now on; `path` is removed with it.
    """

    def __init__(
        self,
        name: str,
        device: ServedDevice,
        listener: socket.socket | None,
        path: str | None = None,
        service: VduseService | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.listener = listener
        self.path = path
        self.service = service
        self.connections: list[Connection] = []
        self.offences = Offences()
        self.rate, self.weight = UNLIMITED, WEIGHT
        self.group: str | None = None

    def may_run(self, frontend: Frontend) -> bool:
        """Whether a front end may start a ring: a device has one user at a time."""
        return not any(
            other.frontend is not frontend and other.frontend.is_running
            for other in self.connections
        )


def open_export(settings: ExportSettings, *, lasting: bool = False) -> Export:
    """The export's disk and socket; `lasting` as BlockDisk has it. Raises what BlockDisk and
    `listen` do; nothing stays then."""
    disk = BlockDisk(settings.disk, lasting=lasting)
    if settings.vduse is not None:
        service = VduseService(settings.vduse, disk, settings.attach)
        return Export(settings.name, disk, None, service=service)
    try:
        listener = listen(settings.socket_path)
    except BaseException:
        disk.close()
        raise
    return Export(settings.name, disk, listener, settings.socket_path)


class Server:
    """Exports and the workers that serve them. Use as a context manager."""

    def __init__(
        self,
        *,
        threads: int = 1,
        poll_us: int = 0,
        report: Report = _to_stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report = report
        self._clock = clock
        # What is done every so many seconds, and when next.
        self._periods: list[tuple[float, Callable[[], None]]] = []
        self._dues: list[float] = []
        # Exports that take no connection for a while.
        self._waiting: dict[str, Export] = {}
        self._selector = selectors.DefaultSelector()
        self.exports: dict[str, Export] = {}
        self._ending = False
        # Another process has what was served here: its sockets stay.
        self.handed_over = False
        self._actions: list[Callable[[], None]] = []
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._spare = Spare()
        self.workers = [Worker(poll_us) for _ in range(threads)]
        self.groups = Groups()
        self._served: dict[int, int] = {}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, export: Export) -> None:
        """Serve an export from now on. Raises what its service does, if it has one; it is closed
        then."""
        if export.service is not None:
            try:
                export.service.begin(self.workers, self.report)
            except BaseException:
                export.device.close()
                raise
            self.exports[export.name] = export
            return
        self.exports[export.name] = export
        self._listen(export)

    def limit(self, name: str, rate: Rate, weight: int, group: str | None) -> None:
        """Change what a disk's export may do, at once and without disturbing it."""
        export = self.exports[name]
        assert isinstance(export.device, BlockDisk)
        self.groups.apply(export.device.share, rate, weight, group)
        export.rate, export.weight, export.group = rate, weight, group
        self._recheck()

    def limit_groups(self, wanted: Iterable[GroupSettings]) -> None:
        """Change what groups of exports may do together."""
        self.groups.follow(wanted)
        self._recheck()

    def _recheck(self) -> None:
        for worker in self.workers:
            worker.recheck()

    def remove(self, name: str, *, unlink: bool = True) -> None:
        """Serve an export no more: its connections end after what they have in flight."""
        export = self.exports.pop(name)
        while export.connections:
            self._drop(export, export.connections[-1])
        if export.listener is not None:
            if self._waiting.pop(name, None) is None:
                self._selector.unregister(export.listener)
            export.listener.close()
        if export.path is not None and unlink:
            unlink_socket(export.path)
        if export.service is not None:
            export.service.end()
        export.device.close()

    def adopt(self, name: str, device: ServedDevice, connection: socket.socket) -> None:
        """Serve a device over a connection that is there already (`--fd`); it ends with it."""
        export = Export(name, device, None)
        self.exports[name] = export
        self._connect(export, connection)

    def watch(self, source: socket.socket, action: Callable[[], None]) -> None:
        """Have `run` call `action` whenever there is something to read."""
        self._selector.register(source, selectors.EVENT_READ, action)

    def unwatch(self, source: socket.socket) -> None:
        self._selector.unregister(source)

    def run(self) -> None:
        """Serve until `stop` is called, or the last export with no listener has lost its client."""
        balanced = time.monotonic()
        while not self._ending and self.exports:
            # One worker has nothing to give away, and needs no clock.
            balances = len(self.workers) > 1 and bool(self._running())
            for key, _ in self._selector.select(self._patience(balances)):
                self._do(key.data)
                if self._ending:
                    # What else there is may be another process's by now.
                    break
            self._listen_again()
            self._keep_periods()
            if balances and time.monotonic() - balanced >= _BALANCE_S:
                self.balance(time.monotonic() - balanced)
                balanced = time.monotonic()

    def _patience(self, balances: bool) -> float | None:
        """For how long there is nothing to do but what sockets say."""
        now = self._clock()
        times = [export.offences.until - now for export in self._waiting.values()]
        times += [due - now for due in self._dues]
        return max(0.0, min([*times, *[_BALANCE_S] * balances])) if times or balances else None

    def held_off_s(self, export: Export) -> float | None:
        """For how long an export takes no connection yet; None if it does."""
        if export.name not in self._waiting:
            return None
        return max(0.0, export.offences.until - self._clock())

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Have `run` call `action` every so many seconds; what it is late for is left out."""
        self._periods.append((seconds, action))
        self._dues.append(self._clock() + seconds)

    def _keep_periods(self) -> None:
        now = self._clock()
        for number, (seconds, action) in enumerate(self._periods):
            if self._dues[number] <= now:
                self._dues[number] = now + seconds
                self._do(action)

    def _listen_again(self) -> None:
        """Take connections of exports that have waited long enough."""
        for export in list(self._waiting.values()):
            if export.offences.until <= self._clock():
                del self._waiting[export.name]
                self._listen(export)

    def _listen(self, export: Export) -> None:
        assert export.listener is not None
        self._selector.register(export.listener, selectors.EVENT_READ, lambda: self._accept(export))

    def _running(self) -> list[ServedQueue]:
        """The queues that workers serve."""
        return [
            vring.queue
            for export in self.exports.values()
            for connection in export.connections
            for vring in connection.frontend.vrings
            if isinstance(vring.queue, ServedQueue)
        ]

    def balance(self, seconds: float) -> bool:
        """Move one queue to a worker that did less in the last seconds, if that evens them.
        Returns whether one was moved."""
        queues: list[list[ServedQueue]] = [[] for _ in self.workers]
        for queue in self._running():
            queues[self.workers.index(queue.worker)].append(queue)
        served = {id(queue): queue.served for found in queues for queue in found}
        before, self._served = self._served, served
        loads = [[(q.served - before.get(id(q), q.served)) / seconds for q in f] for f in queues]
        move = next_move(loads)
        if move is None:
            return False
        source, number, target = move
        return queues[source][number].move(self.workers[target])

    def stop(self) -> None:
        """End `run` from another thread or from a signal handler."""
        self._ending = True
        self._tell(b"x")

    def soon(self, action: Callable[[], None]) -> None:
        """Have `run` do this between two messages; from another thread or a signal handler. What
        waits to be done already is done once."""
        if action not in self._actions:
            self._actions.append(action)
        self._tell(b"a")

    def _tell(self, what: bytes) -> None:
        # Full is as good as told; closed, when `run` has just ended by itself in another thread.
        with suppress(OSError):
            self._waker.send(what)

    def close(self) -> None:
        """End every connection after what it has in flight, then the workers and the disks."""
        for name in list(self.exports):
            self.remove(name, unlink=not self.handed_over)
        for worker in self.workers:
            worker.close()
        self.workers = []
        self.groups.close()
        self._selector.close()
        self._wake.close()
        self._waker.close()
        self._spare.close()

    def resize(self, name: str) -> bool:
        """Take an export's image as large as it is now, and tell its driver."""
        export = self.exports[name]
        if export.service is not None:
            return export.service.resize()
        if not export.device.resize():
            return False
        for connection in export.connections:
            connection.frontend.config_changed()
        return True

    def _woken(self) -> None:
        self._wake.recv(64)
        # Those that come meanwhile have a turn of their own, after what sockets say.
        for _ in range(len(self._actions)):
            self._do(self._actions.pop(0))

    def _do(self, action: Callable[[], None]) -> None:
        """What fails here is not the end of all that is served."""
        try:
            action()
        except Exception as error:
            self.report(error.message if isinstance(error, VfiotoolError) else described(error))

    def _accept(self, export: Export) -> None:
        if export.listener is None or export.name in self._waiting:
            return
        try:
            connection = self._spare.accept(export.listener)
        except Refused as error:
            self.report(f"{export.name}: {error.message}")
            return
        if connection is None:
            return
        if len(export.connections) >= _MOST_CONNECTIONS:
            self.report(f"{export.name}: more than {_MOST_CONNECTIONS} connections")
            connection.close()
            return
        self._connect(export, connection)

    def frontend(self, export: Export) -> Frontend:
        """What a connection to an export begins with. Each export may have its share of the regions
        that the process can map and keep a descriptor of, so that none uses up what the others
        need."""

        def room() -> int:
            held = sum(one.frontend.mapped for one in export.connections)
            others = max(1, len(self.exports))
            files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // others
            return min(MEMORY_ROOM // others, max(_LEAST_REGIONS, files)) - held

        return Frontend(export.device, self.workers, export.may_run, room)

    def _connect(self, export: Export, connection: socket.socket) -> None:
        frontend = self.frontend(export)
        self.attach(export, Connection(connection, Receiver(connection), frontend))

    def resume(self, frontends: Iterable[Frontend]) -> None:
        """Start the queues that were paused; what cannot be started ends its own connection."""
        paused = list(frontends)
        for export in list(self.exports.values()):
            for connection in list(export.connections):
                if connection.closed or connection.frontend not in paused:
                    continue
                try:
                    connection.frontend.resume()
                except VfiotoolError as error:
                    self.report(f"{export.name}: connection ended: {error.message}")
                    self._end(export, connection)

    def attach(self, export: Export, made: Connection) -> None:
        """Take messages of a connection from now on."""
        connection = made.socket
        # With a timeout, half a message or an answer that is not taken would hold up all others.
        connection.setblocking(False)
        export.connections.append(made)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(export, made))

    def _serve(self, export: Export, connection: Connection) -> None:
        if connection.closed:
            # Its event came together with the one that ended it.
            return
        try:
            if export.device.held_up():
                raise ProtocolError("its driver's interrupt blocks")
            message = connection.receiver.receive()
            if message is None:
                return
            answer = connection.frontend.handle(message)
            if answer is None:
                return
            data, descriptor = answer
            try:
                descriptors = [] if descriptor is None else [descriptor]
                sent = socket.send_fds(connection.socket, [data], descriptors)
            except BlockingIOError:
                sent = 0
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            if sent != len(data):
                raise ProtocolError("the front end does not take its answers")
        except EOFError:
            self._end(export, connection)
        except Exception as error:
            # Also a fault of ours: it is this tenant's alone.
            text = error.message if isinstance(error, VfiotoolError) else repr(error)
            self.report(f"{export.name}: connection ended: {text}")
            self._end(export, connection)

    def _end(self, export: Export, connection: Connection) -> None:
        self._disconnect(export, connection)
        if export.listener is None and export.name in self.exports:
            export.device.close()
            del self.exports[export.name]

    def _disconnect(self, export: Export, connection: Connection) -> None:
        self._drop(export, connection)
        if not export.device.held_up():
            return
        # Those beside it are the same tenant's.
        while export.connections:
            self._drop(export, export.connections[-1])
        export.device.forgive()
        if export.listener is not None:
            wait_s = export.offences.note(self._clock())
            self._selector.unregister(export.listener)
            self._waiting[export.name] = export
            self.report(f"{export.name}: its driver held up others: no connection for {wait_s:g} s")

    def _drop(self, export: Export, connection: Connection) -> None:
        connection.closed = True
        export.connections.remove(connection)
        self._selector.unregister(connection.socket)
        for why in connection.frontend.broken():
            self.report(f"{export.name}: {why}")
        for why in connection.frontend.close():
            self.report(f"{export.name}: {why}")
        connection.receiver.close()
        connection.socket.close()
