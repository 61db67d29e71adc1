"""Live update: what a running server hands to the process that takes its place, and takes back.

Over one connected socket go, for each export, its listening and connected sockets, features,
memory regions, queue indices and kick, call and log descriptors, limits with what was taken of
them, and figures. Who receives
checks all of it as a front end's own messages are checked. The order is what keeps two processes
from serving one disk:

1. old: stop the queues after what they fetched, send everything
2. new: map and check everything, serve nothing; "ready"
3. old: "go"; from here on it starts again only if the new process has ended
4. new: start the queues; "started"
5. old: end, leaving the sockets in place

Before 3 the old process starts again after a refusal, an end or a silence of TIMEOUT_S. After it, a
new process that stays silent is killed first.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from vfiotool.errors import KernelError, Refused, UsageError, VfiotoolError
from vfiotool.native.limits import Level, Rate, now_ns
from vfiotool.native.virtqueue import DiskFigures, MemoryRegion
from vfiotool.virtio.backend import Frontend
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.exports import ExportSettings, GroupSettings
from vfiotool.virtio.message import LARGEST_PAYLOAD, InflightArea, Receiver, VringAddresses
from vfiotool.virtio.server import Connection, Export, Server

FORMAT = 1
TIMEOUT_S = 10.0
_HEAD = struct.Struct("<II")
_LARGEST = 16 << 20
_MOST_DESCRIPTORS = 1 << 16
_AT_ONCE = 128
_SMALLEST_HEADER = 12


class Parcel:
    """A JSON value with descriptors: `keep` names one in the value by its number."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def keep(self, descriptor: int | None) -> int | None:
        if descriptor is None:
            return None
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1


class Unpacked:
    """Descriptors that came: each is taken once, the rest is closed with this."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors: dict[int, int] = dict(enumerate(descriptors))

    def take(self, number: int | None) -> int | None:
        if number is None:
            return None
        if type(number) is not int or number not in self._descriptors:
            raise UsageError(f"descriptor {number} was not sent, or is named twice")
        return self._descriptors.pop(number)

    def need(self, number: int | None) -> int:
        found = self.take(number)
        if found is None:
            raise UsageError("a descriptor is missing")
        return found

    def socket(self, number: int | None) -> socket.socket:
        """A descriptor as the socket that it has to be."""
        found = self.need(number)
        try:
            return socket.socket(fileno=found)
        except BaseException:
            os.close(found)
            raise

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def send(
    channel: socket.socket, value: dict[str, Any], descriptors: list[int] | None = None
) -> None:
    """Send a value, and its descriptors in as many messages as they need."""
    data, fds = json.dumps(value).encode(), descriptors or []
    channel.sendall(_HEAD.pack(len(data), len(fds)) + data)
    for start in range(0, len(fds), _AT_ONCE):
        socket.send_fds(channel, [b"f"], fds[start : start + _AT_ONCE])


def receive(channel: socket.socket) -> tuple[dict[str, Any], Unpacked]:
    """What `send` sent. Raises KernelError at the end, after a silence, and for what is damaged."""
    fds: list[int] = []
    with ExitStack() as stack:
        stack.callback(lambda: Unpacked(fds).close())
        try:
            size, count = _HEAD.unpack(_exactly(channel, _HEAD.size))
            if size > _LARGEST or count > _MOST_DESCRIPTORS:
                raise KernelError(f"the other process sent {size} bytes with {count} descriptors")
            value = json.loads(_exactly(channel, size))
            while len(fds) < count:
                data, got, flags, _ = socket.recv_fds(channel, 1, _AT_ONCE)
                fds += got
                if not data or not got or flags & socket.MSG_CTRUNC:
                    raise KernelError("the other process's descriptors did not come")
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, VfiotoolError):
                raise
            raise KernelError(f"the other process: {error}") from error
        if not isinstance(value, dict):
            raise KernelError("the other process sent no object")
        stack.pop_all()
    return value, Unpacked(fds)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise KernelError("the other process ended the connection")
        data += piece
    return bytes(data)


# Packing


def _pack_frontend(frontend: Frontend, receiver: Receiver, parcel: Parcel) -> dict[str, Any]:
    data, pending = receiver.pending
    return {
        "data": data.hex(),
        "pending": [parcel.keep(fd) for fd in pending],
        "features": frontend.features,
        "protocol_features": frontend.protocol_features,
        "regions": [
            [region.guest, region.user, region.size, region.offset, parcel.keep(region.fd)]
            for region in frontend.regions
        ],
        "log": parcel.keep(frontend.log_fd),
        "log_area": asdict(frontend.log_area) if frontend.log_area else None,
        "dirty": parcel.keep(frontend.dirty_fd),
        "dirty_place": [frontend.dirty_bytes, frontend.dirty_offset],
        "channel": parcel.keep(frontend.channel.fileno() if frontend.channel else None),
        "vrings": [
            {
                "size": vring.size,
                "base": vring.base,
                "addresses": asdict(vring.addresses) if vring.addresses else None,
                "kick": parcel.keep(vring.kick),
                "call": parcel.keep(vring.call),
                "error": parcel.keep(vring.error),
                "kicked": vring.kicked,
                "enabled": vring.enabled,
                "paused": vring.paused,
            }
            for vring in frontend.vrings
        ],
    }


def _pack_export(export: Export, parcel: Parcel, clock: int) -> dict[str, Any]:
    assert isinstance(export.device, BlockDisk)
    if export.listener is None:
        raise Refused(f"{export.name} is a VDUSE device, which one process has")
    if export.device.range is not None:
        raise Refused(f"{export.name} is on an NVMe controller, which one process has")
    return {
        "name": export.name,
        "socket_path": export.path,
        "disk": asdict(export.device.settings),
        "rate": asdict(export.rate),
        "level": asdict(export.device.share.level(now=clock)),
        "weight": export.weight,
        "group": export.group,
        "figures": asdict(export.device.figures()),
        "image": parcel.keep(export.device.image),
        "listener": parcel.keep(export.listener.fileno()),
        "connections": [
            {
                "socket": parcel.keep(connection.socket.fileno()),
                **_pack_frontend(connection.frontend, connection.receiver, parcel),
            }
            for connection in export.connections
        ],
    }


def _pack_all(server: Server, listener: socket.socket, parcel: Parcel) -> dict[str, Any]:
    clock = now_ns()
    levels = server.groups.levels(clock)
    return {
        "format": FORMAT,
        "control": parcel.keep(listener.fileno()),
        "clock": clock,
        "groups": {
            name: {**asdict(rate), "level": asdict(levels[name])}
            for name, rate in server.groups.rates.items()
        },
        "exports": [_pack_export(export, parcel, clock) for export in server.exports.values()],
    }


def hand_over(server: Server, channel: socket.socket, listener: socket.socket) -> bool:
    """Give everything to the process at the other end of a control connection, which `listener`
    accepted. Returns whether it serves now; otherwise this process goes on, as before."""
    channel.settimeout(TIMEOUT_S)
    successor = _successor(channel)
    frontends = [c.frontend for export in server.exports.values() for c in export.connections]
    gone = False
    try:
        for frontend in frontends:
            frontend.pause()
        parcel = Parcel()
        whole = _pack_all(server, listener, parcel)
        send(channel, whole, parcel.descriptors)
        _expect(channel, "ready")
        send(channel, {"say": "go"})
        gone = True
        _expect(channel, "started")
        return True
    except (VfiotoolError, OSError) as error:
        if gone:
            _make_sure(successor)
        server.report(f"live update: {getattr(error, 'message', error)}; this process goes on")
        server.resume(frontends)
        return False
    finally:
        os.close(successor)
        channel.close()


def _successor(channel: socket.socket) -> int:
    """A descriptor of the process that connected."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return os.pidfd_open(struct.unpack("3i", data)[0])


def _make_sure(successor: int) -> None:
    """End the process that was told to go, so that no disk is served twice."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(successor, signal.SIGKILL)
    ended = select.poll()
    ended.register(successor, select.POLLIN)
    ended.poll(int(TIMEOUT_S * 1000))


def _expect(channel: socket.socket, word: str) -> None:
    value, unpacked = receive(channel)
    unpacked.close()
    if value.get("say") != word:
        raise KernelError(f"the other process said {str(value.get('say'))[:100]!r}, not {word!r}")


# Unpacking


@dataclass(frozen=True)
class Levels:
    """What was taken of limits and not earned yet at `clock`. An older server sends none of it."""

    clock: int
    groups: dict[str, Level]
    exports: dict[str, Level]

    @classmethod
    def of(cls, value: dict[str, Any]) -> Levels:
        # Of a server whose clock is another (a time namespace), no time has passed.
        clock = min(_whole(value.get("clock", 0)), now_ns())
        groups = {str(name): entry for name, entry in value["groups"].items()}
        exports = {str(entry["name"]): entry for entry in value["exports"]}
        return cls(clock, _levels(groups), _levels(exports))

    def apply(self, server: Server) -> None:
        server.groups.set_levels(self.groups, self.clock)
        for name, level in self.exports.items():
            device = server.exports[name].device
            assert isinstance(device, BlockDisk)
            device.share.set_level(level, now=self.clock)


def _levels(entries: dict[str, Any]) -> dict[str, Level]:
    found = {}
    for name, entry in entries.items():
        if (level := entry.get("level")) is not None:
            kinds = ("requests_ns", "bytes_ns", "typical")
            found[name] = Level(*(_whole(level[kind], 1 << 62) for kind in kinds))
    return found


@dataclass
class TakenOver:
    """What was received and checked, and is not served yet."""

    exports: list[tuple[ExportSettings, Export, list[Connection]]]
    groups: list[GroupSettings]
    levels: Levels
    control: socket.socket
    channel: socket.socket
    unused: ExitStack

    def start(self, server: Server) -> None:
        """Serve it, if the old process says so. Raises KernelError if it does not; nothing is
        served then."""
        with self.unused:
            send(self.channel, {"say": "ready"})
            _expect(self.channel, "go")
            self.unused.pop_all()
        server.limit_groups(self.groups)
        for settings, export, connections in self.exports:
            server.add(export)
            server.limit(export.name, settings.rate, settings.weight, settings.group)
            for connection in connections:
                server.attach(export, connection)
        self.levels.apply(server)
        server.resume([c.frontend for _, _, connections in self.exports for c in connections])
        send(self.channel, {"say": "started"})
        self.channel.close()


def take(server: Server, channel: socket.socket) -> TakenOver:
    """Receive what `hand_over` sends on a control connection that asked for it. Raises UsageError
    or KernelError for what cannot be used; everything that came is closed then."""
    channel.settimeout(TIMEOUT_S)
    value, unpacked = receive(channel)
    with ExitStack() as stack:
        stack.callback(unpacked.close)
        try:
            if value.get("format") != FORMAT:
                raise UsageError(f"the other process speaks format {value.get('format')!r}")
            groups = [GroupSettings(str(n), _rate(r)) for n, r in value["groups"].items()]
            control = unpacked.socket(value["control"])
            stack.callback(control.close)
            levels = Levels.of(value)
            taken = TakenOver([], groups, levels, control, channel, ExitStack())
            for entry in value["exports"]:
                taken.exports.append(_unpack_export(server, entry, unpacked, stack))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            if isinstance(error, VfiotoolError):
                raise
            raise UsageError(f"what the other process sent is damaged: {error!r}") from error
        unpacked.close()
        taken.unused = stack.pop_all()
    return taken


def _whole(value: Any, most: int = (1 << 64) - 1) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a number up to {most}")
    return value


def _rate(value: dict[str, Any]) -> Rate:
    return Rate(*(_whole(value[name], 1 << 40) for name in ("requests", "bytes", "burst_ns")))


def _unpack_export(
    server: Server, value: dict[str, Any], unpacked: Unpacked, stack: ExitStack
) -> tuple[ExportSettings, Export, list[Connection]]:
    settings = ExportSettings(
        str(value["name"]),
        str(value["socket_path"]),
        DiskSettings(**value["disk"]),
        _rate(value["rate"]),
        _whole(value["weight"], 10_000),
        value["group"],
    )
    disk = BlockDisk(settings.disk, unpacked.need(value["image"]))
    stack.callback(disk.close)
    disk.carried = DiskFigures(**{name: _whole(n) for name, n in value["figures"].items()})
    listener = unpacked.socket(value["listener"])
    stack.callback(listener.close)
    listener.setblocking(False)
    export = Export(settings.name, disk, listener, settings.socket_path)
    connections = []
    for entry in value["connections"]:
        with ExitStack() as own:
            connected = unpacked.socket(entry["socket"])
            own.callback(connected.close)
            receiver = Receiver(connected)
            own.callback(receiver.close)
            frontend = server.frontend(export)
            own.callback(frontend.close)
            try:
                _unpack_frontend(frontend, receiver, entry, unpacked)
            except _Gone as error:
                # Its own connection's end, and no reason for the others to stay where they are.
                server.report(f"{settings.name}: connection ended: {error.message}")
                continue
            stack.push(own.pop_all())
        connections.append(Connection(connected, receiver, frontend))
    return settings, export, connections


class _Gone(VfiotoolError):
    """What a machine has announced cannot be mapped any more, such as a file that it truncated."""


@contextmanager
def _of_machine() -> Iterator[None]:
    """Not where this process has no room for it: then all are better served where they are."""
    try:
        yield
    except UsageError as error:
        raise _Gone(error.message) from error


def _unpack_frontend(
    frontend: Frontend, receiver: Receiver, value: dict[str, Any], unpacked: Unpacked
) -> None:
    data = bytes.fromhex(value["data"])
    if len(data) >= _SMALLEST_HEADER + LARGEST_PAYLOAD:
        raise ValueError("a message that is too long")
    receiver.pending = (data, [])
    for number in value["pending"]:
        receiver.pending[1].append(unpacked.need(number))
    frontend.features = _whole(value["features"])
    if frontend.features & ~frontend.offered():
        raise ValueError("features that are not offered here")
    frontend.protocol_features = _whole(value["protocol_features"])
    for vring, entry in zip(frontend.vrings, value["vrings"], strict=True):
        vring.size, vring.base = _whole(entry["size"], 1024), _whole(entry["base"], 0xFFFF_FFFF)
        if vring.size & (vring.size - 1):
            raise ValueError(f"a ring of {vring.size} entries")
        if entry["addresses"] is not None:
            numbers = {name: _whole(n) for name, n in entry["addresses"].items()}
            vring.addresses = VringAddresses(**numbers)
        vring.kick = unpacked.take(entry["kick"])
        vring.call = unpacked.take(entry["call"])
        vring.error = unpacked.take(entry["error"])
        vring.kicked, vring.enabled = bool(entry["kicked"]), bool(entry["enabled"])
        vring.paused = bool(entry["paused"])
    _unpack_memory(frontend, value, unpacked)


def _unpack_memory(frontend: Frontend, value: dict[str, Any], unpacked: Unpacked) -> None:
    """Map what came; a descriptor is the front end's once it is mapped, and closed otherwise."""
    regions: list[MemoryRegion] = []
    with ExitStack() as stack:
        for guest, user, size, offset, number in value["regions"]:
            fd = unpacked.need(number)
            stack.callback(os.close, fd)
            places = (_whole(guest), _whole(user), _whole(size), _whole(offset))
            regions.append(MemoryRegion(*places, fd))
        if regions:
            with _of_machine():
                frontend.set_memory(regions)
        stack.pop_all()
    for part in _logs(frontend, value):
        with ExitStack() as stack:
            fd = unpacked.need(part[0])
            stack.callback(os.close, fd)
            with _of_machine():
                part[1](fd)
            stack.pop_all()
    if value["channel"] is not None:
        frontend.channel = unpacked.socket(value["channel"])


def _logs(frontend: Frontend, value: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    if value["log"] is not None:
        area = InflightArea(**{name: _whole(n) for name, n in value["log_area"].items()})
        yield value["log"], lambda fd: frontend.set_log(area, fd)
    if value["dirty"] is not None:
        size, offset = (_whole(number) for number in value["dirty_place"])
        yield value["dirty"], lambda fd: frontend.set_dirty_log(size, offset, fd)
