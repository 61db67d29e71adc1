"""A disk whose file answers late, beside one in memory, on one worker: nobody waits for it.

    unshare --mount python -m tests.virtio.slow_neighbour FOLDER drained|suspended

Mounts a FUSE file system of its own on FOLDER, whose reads wait until they are let go, and exits 0
if all held. Run by test_slow_neighbour.py, in a mount namespace that ends with it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path

from tests.virtio.frontend import DATA, SIZE, T_IN, TIMEOUT_S, Frontend
from vfiotool.virtio.backend import PROTOCOL_FEATURES
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.message import ProtocolFeature, VhostRequest
from vfiotool.virtio.server import Export, Server

MIB = 1 << 20
# Opcodes and records of linux/fuse.h, protocol 7.31.
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT, _INTERRUPT = 1, 3, 14, 15, 18, 25, 26, 36
_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_ENOENT, _EINTR, _ENOSYS = 2, 4, 38
_MOST_S = 15.0


class SlowFile:
    """A file system with one file of `size` bytes, `disk`, whose reads wait until they are let go.

    It is served by a process of its own, that ends by itself: one that waits for its own file could
    not even be killed.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._asked, self._going = os.eventfd(0), os.eventfd(0)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"slow", os.fsencode(folder), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount of fuse")
        self._pid = os.fork()
        if self._pid == 0:
            with suppress(BaseException):
                self._serve()
            os._exit(0)
        os.close(self._fd)

    def was_asked(self, *, again: bool = False) -> bool:
        """Whether a read has come; `again`: since this was asked last."""
        if not select.select([self._asked], [], [], _MOST_S)[0]:
            return False
        if again:
            os.eventfd_read(self._asked)
        return True

    def let_go(self) -> None:
        os.eventfd_write(self._going, 1)

    def close(self) -> None:
        """End it, once nobody has its file open."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _serve(self) -> None:
        held: list[tuple[int, bytes]] = []
        going = False
        while True:
            ready = select.select([self._fd, self._going], [], [], _MOST_S)[0]
            if not ready and going:
                return
            going = going or not ready
            if self._going in ready:
                going = bool(os.eventfd_read(self._going))
            if self._fd in ready:
                request = os.read(self._fd, 1 << 18)
                _, opcode, unique, node, *_ = _IN.unpack_from(request)
                if opcode == _READ:
                    held.append((unique, request))
                    os.eventfd_write(self._asked, 1)
                elif opcode == _INTERRUPT:
                    (given_up,) = struct.unpack_from("<Q", request, _IN.size)
                    for one in [one for one in held if one[0] == given_up]:
                        held.remove(one)
                        self._reply(given_up, _EINTR, b"")
                else:
                    self._reply(unique, *self._answer(opcode, node, request[_IN.size :]))
            while going and held:
                unique, request = held.pop()
                _, offset, size = struct.unpack_from("<QQI", request, _IN.size)
                self._reply(unique, 0, b"s" * max(0, min(size, self.size - offset)))

    def _reply(self, unique: int, error: int, body: bytes) -> None:
        os.write(self._fd, _OUT.pack(_OUT.size + len(body), -error, unique) + body)

    def _answer(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        if opcode == _INIT:
            sizes = struct.pack("<IIII HHIIHH 28x", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 16, 0)
            return 0, sizes
        if opcode == _LOOKUP:
            if body.rstrip(b"\0") != b"disk":
                return _ENOENT, b""
            return 0, struct.pack("<QQQQII", 2, 0, 60, 60, 0, 0) + self._attributes(2)
        if opcode == _GETATTR:
            return 0, struct.pack("<QII", 60, 0, 0) + self._attributes(node)
        if opcode == _OPEN:
            return 0, struct.pack("<QII", 1, 0, 0)
        return (0, b"") if opcode in (_RELEASE, _FLUSH) else (_ENOSYS, b"")

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == 1 else (0o100644, self.size)
        fields = (node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
        return _ATTRIBUTES.pack(*fields)


def lay_down(front: Frontend, room: int, number: int = 0) -> None:
    """Make one read available without waiting for it; each has a place of its own."""
    ring, at = front.rings[0], DATA + number * 0x2000
    front.memory[at : at + 16] = struct.pack("<IIQ", T_IN, 0, 16 * number)
    front.memory[at + 16] = 0xFF
    front.put(ring, 3 * number, [(at, 16, False), (at + 32, room, True), (at + 16, 1, True)])
    front.add(ring, 3 * number)


def is_silent(front: Frontend) -> bool:
    """Whether neither an answer nor a completion has come."""
    ring = front.rings[0]
    return (
        not select.select([front.socket], [], [], 0.1)[0]
        and front.u16(ring.at + 0x2002) == ring.seen
    )


def check(folder: Path, way: str) -> None:
    slow_file = SlowFile(folder, MIB)
    sockets = {name: str(folder.parent / name) for name in ("slow", "quick")}
    disks = {
        "slow": DiskSettings(path=str(folder / "disk"), read_only=True),
        "quick": DiskSettings(size=MIB),
    }
    with Server() as server:
        for name, settings in disks.items():
            server.add(Export(name, BlockDisk(settings), listen(sockets[name])))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            if way == "suspended":
                drive_suspended(slow_file, sockets["slow"])
            else:
                drive(slow_file, Frontend(sockets["slow"]), Frontend(sockets["quick"]))
        finally:
            slow_file.let_go()
            server.stop()
            thread.join()
    slow_file.close()


def drive(slow_file: SlowFile, slow: Frontend, quick: Frontend) -> None:
    for front in (slow, quick):
        front.up()
    lay_down(slow, 4096)
    assert slow_file.was_asked()
    for number in range(200):
        assert quick.write(number, bytes([number]) * 512) == 0
        assert quick.read(number, 512) == bytes([number]) * 512
    # Stopping it waits for its request; its neighbour's queue is not held by that.
    slow.send(VhostRequest.GET_VRING_BASE, struct.pack("<II", 0, 0))
    assert quick.read(7, 512) == bytes([7]) * 512
    assert is_silent(slow)
    slow_file.let_go()
    _, answer, _ = slow.receive()
    assert struct.unpack("<II", answer) == (0, 1)
    assert slow.wait(slow.rings[0]) == [(0, 4097)]
    assert slow.memory[DATA + 32 : DATA + 32 + 4096] == b"s" * 4096
    assert slow.memory[DATA + 16] == 0
    slow.close()
    quick.close()


def drive_suspended(slow_file: SlowFile, path: str) -> None:
    """A machine that moves does not wait for the disk: its reads go along in the log."""
    front = Frontend(path)
    front.negotiate()
    front.share()
    front.send(VhostRequest.GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 1, SIZE))
    _, area, (log,) = front.receive()
    assert front.acknowledged(VhostRequest.SET_INFLIGHT_FD, area, [log]) == 0
    front.start()
    count = 12  # more than io_uring gives its threads at once
    for turn, request in enumerate(
        (VhostRequest.GET_VRING_BASE_SKIP_DRAIN, VhostRequest.GET_VRING_BASE)
    ):
        if turn:
            # Of a front end that knows but the first meaning of it.
            without = 1 << ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
            wanted = struct.pack("<Q", PROTOCOL_FEATURES & ~without)
            front.send(VhostRequest.SET_PROTOCOL_FEATURES, wanted)
            front.start(base=count)
        else:
            for number in range(count):
                lay_down(front, 4096, number)
        assert slow_file.was_asked(again=True)
        assert struct.unpack("<II", front.ask(request, struct.pack("<II", 0, 0))) == (0, count)
        assert front.u16(front.rings[0].at + 0x2002) == 0, "answered without its data"
    # Where it went.
    front.socket.close()
    front.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    front.socket.settimeout(TIMEOUT_S)
    front.socket.connect(path)
    front.negotiate()
    front.share()
    assert front.acknowledged(VhostRequest.SET_INFLIGHT_FD, area, [log]) == 0
    slow_file.let_go()
    front.start(base=count)
    done = front.wait(front.rings[0], count)
    assert sorted(done) == [(3 * number, 4097) for number in range(count)]
    for number in range(count):
        at = DATA + number * 0x2000
        assert front.memory[at + 16] == 0
        assert front.memory[at + 32 : at + 32 + 4096] == b"s" * 4096
    os.close(log)
    front.close()


if __name__ == "__main__":
    check(Path(sys.argv[1]), sys.argv[2])
