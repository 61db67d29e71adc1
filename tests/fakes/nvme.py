"""An NVMe controller in plain memory, for tests of the driver without a device.

Registers are answered in Python; doorbells are words that a thread watches; data moves through
PRP lists as a real controller's would, out of a table of I/O addresses that knows every buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vfiotool.errors import KernelError, UsageError
from vfiotool.native.library import PinCount

PAGE = 4096
DOORBELLS = 0x1000


class Memory(PinCount):
    """A DMA buffer as the driver sees one."""

    def __init__(self, table: dict[int, Memory], size: int, iova: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.iova = iova
        self._table = table
        self._map = mmap.mmap(-1, self.size)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        table[iova] = self

    def _refuse_pin(self) -> None:
        raise UsageError("the DMA buffer is closed")

    def close(self) -> None:
        if self.pins:
            raise UsageError("the DMA buffer is in use")
        self._shut()
        self._table.pop(self.iova, None)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FakeInterrupt:
    """A vector: an eventfd."""

    def __init__(self, owner: FakeInterrupts) -> None:
        self.owner = owner
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK)

    def wait(self, timeout_s: float | None = None) -> int:
        if self.descriptor < 0:
            raise UsageError("the interrupt is off")
        try:
            select.select([self.descriptor], [], [], timeout_s)
            return os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return 0
        except (OSError, ValueError) as error:
            raise UsageError("the interrupt is off") from error


class FakeInterrupts:
    """What `device.irqs.msix` gives."""

    def __init__(self, count: int) -> None:
        self.closed = False
        self.vectors = [FakeInterrupt(self) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.vectors)

    def add(self, count: int) -> None:
        self.vectors += [FakeInterrupt(self) for _ in range(count)]

    def fire(self, vector: int) -> None:
        if not self.closed and 0 <= vector < len(self.vectors):
            os.eventfd_write(self.vectors[vector].descriptor, 1)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for one in self.vectors:
                os.close(one.descriptor)
                one.descriptor = -1


class FakeNvme:
    """The device and its controller: hand it to `Controller` as a Device. Use as a context
    manager; the knobs (`mute`, `fail`, `ready`, `fatal`, `mad`) can be turned at any time."""

    def __init__(self, blocks: int = 4096, shift: int = 9) -> None:
        self.name = "fake"
        self.disk = bytearray(blocks << shift)
        self.blocks, self.shift, self.metadata = blocks, shift, 0
        self.buffers: dict[int, Memory] = {}
        self.next_iova = 0x10_0000
        self.registers = {0x14: 0, 0x1C: 0, 0x24: 0, 0x28: 0, 0x2C: 0, 0x30: 0, 0x34: 0}
        self.configurations: list[int] = []
        self.admin_seen: list[int] = []
        self.queues: dict[int, dict[str, Any]] = {}
        self.completions: dict[int, tuple[int, int]] = {}
        self.ready, self.fatal, self.mute, self.mad, self.gone = True, False, False, False, False
        self.fail: dict[tuple[int, int], int] = {}
        self.serial = b"fake-1".ljust(20)
        self.hooks: list[Callable[[], object]] = []
        self.bus_master: list[bool] = []
        self.info = SimpleNamespace(is_pci=True, has_reset=False)
        self.gate = (ctypes.c_uint32 * 2)(1, 0)
        self.pins = 0
        self.vendor, self.device, self.class_code = 0x1B36, 0x0010, 0x010802
        self.dma = SimpleNamespace(alloc=self.alloc)
        self.entries, self.shutdown_s, self.rtd3e_us = 1024, 0.0, 0
        self.vectors: dict[int, int] = {}
        self.held: list[tuple[int, dict[str, Any], int, int, int]] = []
        self.hold = False
        self.events: list[int] = []
        self.commands_seen: list[bytes] = []
        self.logs: dict[int, bytes] = {}
        self.features: dict[int, int] = {}
        self.nsids = [1]
        self.command_sets, self.sets_of = 1, {1: 0}
        self.arbitration = 0  # CAP.AMS
        self._shutting: float | None = None
        self.irqs = SimpleNamespace(msix=self._msix)
        self.sets: list[FakeInterrupts] = []
        self._bells = mmap.mmap(-1, PAGE)
        self._words = (ctypes.c_uint32 * (PAGE // 4)).from_buffer(self._bells)
        self._ending = False
        self.lock = threading.RLock()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> FakeNvme:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in reversed(self.hooks):
            hook()
        self._ending = True
        self._thread.join()

    def alloc(self, size: int, *, align: int = PAGE) -> Memory:
        # As a Device: before the lock, which a thread of the parent may hold for ever.
        if os.getpid() != self._process:
            raise UsageError("this process is a child of the one that opened the device")
        with self.lock:
            found = Memory(self.buffers, size, self.next_iova)
            # A hole after each buffer: a PRP that runs on hits nothing.
            self.next_iova += found.size + 16 * PAGE
            return found

    def on_close(self, hook: Callable[[], object]) -> None:
        self.hooks.append(hook)

    def set_bus_master(self, on: bool) -> None:
        self.bus_master.append(on)

    def region(self, index: int) -> FakeNvme:
        assert index == 0
        return self

    def map(self, _offset: int = 0) -> FakeNvme:
        return self

    def access(self) -> FakeNvme:
        return self

    def pin(self) -> int:
        self.pins += 1
        return ctypes.addressof(self.gate)

    def unpin(self) -> None:
        assert self.pins > 0
        self.pins -= 1

    def block(self, blocked: bool) -> None:
        """As Mapping does it: nobody is at the doorbells when this returns."""
        self.gate[0] = 0 if blocked else 1
        self.wait(lambda: not self.gate[1])

    def address(self, offset: int, length: int) -> int:
        return ctypes.addressof(self._words) + offset - DOORBELLS

    def read32(self, offset: int) -> int:
        if self.gone:
            return 0xFFFFFFFF
        if offset == 0:
            return 2 << 24 | self.arbitration << 17 | 1 << 16 | self.entries - 1
        if offset == 4:
            return self.command_sets << (37 - 32)
        if offset == 8:
            return 0x00020000
        if offset == 0x1C:
            enabled = self.registers[0x14] & 1
            shutdown = 0
            if self.registers[0x14] >> 14 & 3 and self._shutting is not None:
                shutdown = 2 if time.monotonic() - self._shutting >= self.shutdown_s else 1
            up = int(bool(enabled and self.ready))
            return up | int(self.fatal) << 1 | shutdown << 2
        return self.registers[offset]

    def write32(self, offset: int, value: int) -> None:
        if offset == 0x14:
            self.configurations.append(value)
            self._shutting = time.monotonic() if value >> 14 & 3 else None
            if not value & 1:
                self._forget()
            if value & 1 and not self.registers[0x14] & 1:
                self._begin()
        self.registers[offset] = value

    def read64(self, offset: int) -> int:
        raise AssertionError("64-bit registers are read as two halves")

    def write64(self, offset: int, value: int) -> None:
        raise AssertionError("64-bit registers are written as two halves")

    def poll(self, offset: int, mask: int, wanted: int, timeout_s: float, *, width: int = 4) -> int:
        end = time.monotonic() + timeout_s
        while (value := self.read32(offset)) & mask != wanted:
            if time.monotonic() > end:
                raise KernelError("timed out", errno_name="ETIMEDOUT")
            time.sleep(1e-3)
        return value

    def _forget(self) -> None:
        """CC.EN=0, or a reset: queues are gone, what was out is not answered."""
        with self.lock:
            self.queues, self.held, self.fatal = {}, [], False
            self.events.clear()

    def reset(self) -> None:
        """Somebody else's reset: CC.EN is 0 afterwards, and DMA is off."""
        self.registers[0x14] = 0
        self._forget()

    def _msix(self, count: int) -> FakeInterrupts:
        assert all(one.closed for one in self.sets), "one kind at a time"
        self.sets.append(FakeInterrupts(count))
        return self.sets[-1]

    def release(self, order: Callable[[list[Any]], None] | None = None) -> None:
        """Answer what is held, in the order that `order` puts it in."""
        with self.lock:
            held, self.held = self.held, []
            if order is not None:
                order(held)
            for number, queue, cid, status, result in held:
                if self.queues.get(number) is queue:
                    self._complete(number, queue, cid, status, result)

    def event(self, result: int) -> bool:
        """Answer an Asynchronous Event Request; False where none is out."""
        with self.lock:
            if not self.events:
                return False
            self._complete(0, self.queues[0], self.events.pop(0), 0, result)
            return True

    def _begin(self) -> None:
        sizes = self.registers[0x24]
        self.queues = {}
        self._words[:] = (0,) * len(self._words)
        self.completions[0] = (self._wide(0x30), (sizes >> 16 & 0xFFF) + 1)
        self._add(0, self._wide(0x28), (sizes & 0xFFF) + 1, 0)

    def _wide(self, offset: int) -> int:
        return self.registers[offset] | self.registers[offset + 4] << 32

    def _add(self, number: int, iova: int, entries: int, cq: int) -> None:
        base, room = self.completions[cq]
        self.queues[number] = {
            "base": iova, "entries": entries, "head": 0, "cq": cq,
            "cq_base": base, "cq_entries": room, "cq_tail": 0, "phase": 1,
        }  # fmt: skip

    def at(self, iova: int, length: int) -> memoryview:
        """The memory behind an I/O address; an address that nobody mapped is a KeyError."""
        for buffer in list(self.buffers.values()):
            if buffer.iova <= iova and iova + length <= buffer.iova + buffer.size:
                start = iova - buffer.iova
                return buffer.view[start : start + length]
        raise KeyError(f"no DMA mapping at {iova:#x}")

    def _live(self) -> None:
        while not self._ending:
            worked = False
            for number, queue in list(self.queues.items()):
                while not self.mute and queue["head"] != self._words[2 * number]:
                    worked = True
                    with self.lock:
                        if self.queues.get(number) is not queue:
                            break
                        self._step(number, queue)
            if not worked:
                time.sleep(2e-4)

    def _step(self, number: int, queue: dict[str, Any]) -> None:
        entry = bytes(self.at(queue["base"] + 64 * queue["head"], 64))
        queue["head"] = (queue["head"] + 1) % queue["entries"]
        opcode, cid = entry[0], struct.unpack_from("<H", entry, 2)[0]
        status = self.fail.pop((number, opcode), None)
        result = 0
        if status is None:
            try:
                status, result = (self._admin if number == 0 else self._io)(opcode, entry)
            except KeyError:
                status = 0x04
        if number == 0:
            self.admin_seen.append(opcode)
            if opcode == 0x0C:
                self.events.append(cid)
                return
        if number in self.queues:
            cid = 9999 if self.mad else cid
            if self.hold and number:
                self.held.append((number, queue, cid, status, result))
            else:
                self._complete(number, queue, cid, status, result)

    def _complete(
        self, number: int, queue: dict[str, Any], cid: int, status: int, result: int
    ) -> None:
        place = self.at(queue["cq_base"] + 16 * queue["cq_tail"], 16)
        place[:14] = struct.pack("<IIHHH", result, 0, queue["head"], number, cid)
        place[14:] = struct.pack("<H", status << 1 | queue["phase"])
        queue["cq_tail"] += 1
        if queue["cq_tail"] == queue["cq_entries"]:
            queue["cq_tail"], queue["phase"] = 0, queue["phase"] ^ 1
        for vectors in self.sets:
            vectors.fire(self.vectors.get(number, -1))

    def _admin(self, opcode: int, entry: bytes) -> tuple[int, int]:
        (nsid,) = struct.unpack_from("<I", entry, 4)
        (prp1,) = struct.unpack_from("<Q", entry, 24)
        ten, eleven = struct.unpack_from("<II", entry, 40)
        number, entries = ten & 0xFFFF, (ten >> 16) + 1
        if opcode == 0x06:
            return self._identify(ten & 0xFF, nsid, prp1), 0
        if opcode == 0x09:
            if ten & 0xFF != 7:
                self.features[ten & 0xFF] = eleven
            return 0, 7 << 16 | 7 if ten & 0xFF == 7 else 0
        self.commands_seen.append(entry)
        if opcode == 0x02:
            size = ((ten >> 16) + (eleven << 16) + 1) * 4
            (offset,) = struct.unpack_from("<Q", entry, 48)
            if ten & 0xFF not in self.logs:
                return 0x109, 0
            self.at(prp1, size)[:] = self.logs[ten & 0xFF][offset : offset + size].ljust(
                size, b"\0"
            )
            return 0, 0
        if opcode == 0x08:
            held = [one for one in self.held if one[0] == ten & 0xFFFF and one[2] == ten >> 16]
            for one in held:
                self.held.remove(one)
                self._complete(one[0], one[1], one[2], 0x07, 0)
            return 0, int(not held)
        if opcode in (0x0D, 0x10, 0x11, 0x15, 0x80, 0x84):
            return 0, 7
        if opcode == 0x0A:
            return (0, self.features[ten & 0xFF]) if ten & 0xFF in self.features else (0x02, 0)
        if opcode == 0x05:
            self.completions[number] = (prp1, entries)
            self.vectors[number] = eleven >> 16 if eleven & 2 else -1
        elif opcode == 0x01:
            self._words[2 * number] = self._words[2 * number + 1] = 0
            self._add(number, prp1, entries, eleven >> 16)
        elif opcode == 0x00:
            del self.queues[number]
        elif opcode == 0x04:
            del self.completions[number]
        else:
            return 0x01, 0
        return 0, 0

    def _identify(self, cns: int, nsid: int, prp1: int) -> int:
        page = bytearray(PAGE)
        if cns == 0x01:
            page[4:24], page[24:64] = self.serial, b"Fake \x1b[31m".ljust(40)
            page[77] = 5
            page[88:92] = struct.pack("<I", self.rtd3e_us)
        elif cns == 0x02:
            later = [one for one in self.nsids if one > nsid][:1024]
            page[: 4 * len(later)] = struct.pack(f"<{len(later)}I", *later)
        elif nsid not in self.nsids:
            return 0x0B
        elif cns == 0x03:
            page[:5] = struct.pack("<BBxxB", 4, 1, self.sets_of[nsid])
        else:
            page[:8] = struct.pack("<Q", self.blocks)
            page[128:131] = struct.pack("<HB", self.metadata, self.shift)
        self.at(prp1, PAGE)[:] = page
        return 0

    def _io(self, opcode: int, entry: bytes) -> tuple[int, int]:
        prp1, prp2, lba = struct.unpack_from("<QQQ", entry, 24)
        blocks = struct.unpack_from("<H", entry, 48)[0] + 1
        size, at = blocks << self.shift, lba << self.shift
        if opcode == 0:
            return 0, 0
        if opcode == 0x09:
            return self._trim(struct.unpack_from("<I", entry, 40)[0] + 1, prp1), 0
        if opcode == 0x19:
            return self._copy(lba, entry[48] + 1, prp1), 0
        if opcode not in (0x01, 0x02, 0x05, 0x08, 0x0C):
            return 0x01, 0
        if lba + blocks > self.blocks:
            return 0x80, 0
        if opcode == 0x08:
            self.disk[at : at + size] = bytes(size)
        if opcode in (0x08, 0x0C):
            return 0, 0
        places = self.scattered(entry) if entry[1] >> 6 else self.pieces(prp1, prp2, size)
        for iova, length in places:
            if opcode == 2:
                self.at(iova, length)[:] = self.disk[at : at + length]
            elif opcode == 1:
                self.disk[at : at + length] = self.at(iova, length)
            elif bytes(self.at(iova, length)) != self.disk[at : at + length]:
                return 0x285, 0
            at += length
        return 0, 0

    def _trim(self, count: int, iova: int) -> int:
        for number in range(count):
            _, blocks, lba = struct.unpack_from("<IIQ", self.at(iova + 16 * number, 16))
            self.disk[lba << self.shift : (lba + blocks) << self.shift] = bytes(
                blocks << self.shift
            )
        return 0

    def _copy(self, to: int, count: int, iova: int) -> int:
        data = b""
        for number in range(count):
            lba, blocks = struct.unpack_from("<8xQH", self.at(iova + 32 * number, 32))
            data += self.disk[lba << self.shift : (lba + blocks + 1) << self.shift]
        self.disk[to << self.shift : (to << self.shift) + len(data)] = data
        return 0

    def scattered(self, entry: bytes) -> list[tuple[int, int]]:
        """Where a command's data lies by its scatter list (4.1.2)."""
        iova, length = struct.unpack_from("<QI", entry, 24)
        if entry[39] >> 4 == 0:
            return [(iova, length)]
        assert entry[39] >> 4 == 3 and length % 16 == 0
        raw = bytes(self.at(iova, length))
        return [struct.unpack_from("<QI", raw, at) for at in range(0, length, 16)]

    def pieces(self, prp1: int, prp2: int, size: int) -> list[tuple[int, int]]:
        """Where a command's data lies, page by page (Base Specification 2.0, 4.1.1)."""
        first = min(size, PAGE - prp1 % PAGE)
        found, left = [(prp1, first)], size - first
        if left > PAGE:
            count = -(-left // PAGE)
            entries = struct.unpack(f"<{count}Q", self.at(prp2, 8 * count))
        else:
            entries = (prp2,) if left else ()
        for iova in entries:
            assert iova % PAGE == 0, "only the first page may begin within itself"
            found.append((iova, min(left, PAGE)))
            left -= PAGE
        return found

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; fails after ten seconds."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            with contextlib.suppress(InterruptedError):
                time.sleep(1e-3)
