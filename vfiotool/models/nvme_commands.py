"""What the commands of the NVMe model do: admin, identify, and I/O on a disk in memory.

NVM Express Base Specification 2.0, section 5 (admin commands) and 4.1 (PRPs and SGLs); NVM Command
Set Specification 1.0, section 3.2 (I/O commands) and 4.1.5 (identify). Statuses: figure 97.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar

from vfiotool.models.nvme_rings import CompletionRing, HeldAnswer, SubmissionRing

PAGE = 4096
# (status, result); None as the result: it is answered later.
Outcome = tuple[int, int | None]
INVALID_OPCODE, INVALID_FIELD, TRANSFER_ERROR, ABORTED = 0x01, 0x02, 0x04, 0x07
_INVALID_NAMESPACE, _LBA_OUT_OF_RANGE = 0x0B, 0x80
_BAD_COMPLETIONS, _BAD_NUMBER, _BAD_SIZE, _BAD_VECTOR = 0x100, 0x101, 0x102, 0x108
_BAD_LOG, _BAD_DELETION, _COMPARE_FAILED = 0x109, 0x10C, 0x285
_PAIRS = 8
# Of arbitration, power, temperature, errors, write cache, coalescing, atomicity, events.
_DEFAULT_FEATURES = {1: 0, 2: 0, 4: 0x157, 5: 0, 6: 1, 8: 0, 9: 0, 10: 0, 11: 0}


class NvmeCommands:
    """The commands, mixed into `NvmeModel`, which has the queues and reaches memory."""

    entries: int
    version: int
    shift: int
    blocks: int
    msix: ClassVar[int]
    submissions: dict[int, SubmissionRing]
    completions: dict[int, CompletionRing]
    held: list[HeldAnswer]
    dma_read: Callable[[int, int], bytes]
    dma_write: Callable[[int, bytes | bytearray | memoryview], None]
    add_completions: Callable[[int, int, int, int], None]
    add_submissions: Callable[[int, int, int, int], None]
    complete: Callable[[SubmissionRing, int, int, int], None]

    def set_disk(self, blocks: int, shift: int) -> None:
        """A disk of zeros, and the identity of the controller."""
        self.blocks, self.shift, self.metadata = blocks, shift, 0
        self.disk = bytearray(blocks << shift)
        self.serial, self.model_name, self.firmware = b"model-1", b"vfiotool NVMe model", b"1"
        self.max_transfer_exponent, self.rtd3e_us = 5, 0
        self.nsids, self.sets_of = [1], {1: 0}
        self.logs: dict[int, bytes] = {2: _smart()}
        self.features: dict[int, int] = dict(_DEFAULT_FEATURES)
        self.events: list[int] = []
        self.admin_seen: list[int] = []
        self.commands_seen: list[bytes] = []

    def admin_command(self, opcode: int, entry: bytes) -> Outcome:
        """Run an admin command's 64 bytes."""
        self.admin_seen.append(opcode)
        if opcode not in (0x06, 0x09):
            self.commands_seen.append(entry)
        runs: dict[int, Callable[[bytes], Outcome]] = {
            0x00: self._delete_submissions, 0x01: self._create_submissions, 0x02: self._log,
            0x04: self._delete_completions, 0x05: self._create_completions, 0x06: self._identify,
            0x08: self._abort, 0x09: self._set_features, 0x0A: self._get_features,
            0x0C: self._await_event,
        }  # fmt: skip
        if opcode in (0x0D, 0x10, 0x11, 0x15, 0x80, 0x84):
            return 0, 7
        run = runs.get(opcode)
        return (INVALID_OPCODE, 0) if run is None else run(entry)

    def _await_event(self, entry: bytes) -> Outcome:
        self.events.append(struct.unpack_from("<H", entry, 2)[0])
        return 0, None

    def _create_completions(self, entry: bytes) -> Outcome:
        base, number, entries, rest = _creation(entry)
        if not 0 < number <= _PAIRS or number in self.completions:
            return _BAD_NUMBER, 0
        if not 2 <= entries <= self.entries:
            return _BAD_SIZE, 0
        vector = rest >> 16 if rest & 2 else -1
        if vector >= self.msix:
            return _BAD_VECTOR, 0
        self.add_completions(number, base, entries, vector)
        return 0, 0

    def _create_submissions(self, entry: bytes) -> Outcome:
        base, number, entries, rest = _creation(entry)
        if not 0 < number <= _PAIRS or number in self.submissions:
            return _BAD_NUMBER, 0
        if not 2 <= entries <= self.entries:
            return _BAD_SIZE, 0
        if rest >> 16 not in self.completions or not rest >> 16:
            return _BAD_COMPLETIONS, 0
        self.add_submissions(number, base, entries, rest >> 16)
        return 0, 0

    def _delete_submissions(self, entry: bytes) -> Outcome:
        number = struct.unpack_from("<H", entry, 40)[0]
        if not number or number not in self.submissions:
            return _BAD_NUMBER, 0
        del self.submissions[number]
        return 0, 0

    def _delete_completions(self, entry: bytes) -> Outcome:
        number = struct.unpack_from("<H", entry, 40)[0]
        if not number or number not in self.completions:
            return _BAD_NUMBER, 0
        if any(queue.completions == number for queue in self.submissions.values()):
            return _BAD_DELETION, 0
        del self.completions[number]
        return 0, 0

    def _log(self, entry: bytes) -> Outcome:
        (prp1, prp2), (ten, eleven) = _pointers(entry), struct.unpack_from("<II", entry, 40)
        (offset,) = struct.unpack_from("<Q", entry, 48)
        size = ((ten >> 16) + ((eleven & 0xFFFF) << 16) + 1) * 4
        log = self.logs.get(ten & 0xFF)
        if log is None:
            return _BAD_LOG, 0
        if size > 1 << 20:
            return INVALID_FIELD, 0
        data = log[offset : offset + size].ljust(size, b"\0")
        self._scatter(self.pieces(prp1, prp2, size), data)
        return 0, 0

    def _abort(self, entry: bytes) -> Outcome:
        number, cid = struct.unpack_from("<HH", entry, 40)
        found = [one for one in self.held if one.queue.number == number and one.cid == cid]
        for one in found:
            self.held.remove(one)
            self.complete(one.queue, one.cid, ABORTED, 0)
        return 0, int(not found)

    def _set_features(self, entry: bytes) -> Outcome:
        ten, eleven = struct.unpack_from("<II", entry, 40)
        if ten & 0xFF == 7:
            return 0, (_PAIRS - 1) << 16 | _PAIRS - 1
        self.features[ten & 0xFF] = eleven
        return 0, 0

    def _get_features(self, entry: bytes) -> Outcome:
        number = entry[40]
        if number == 7:
            return 0, (_PAIRS - 1) << 16 | _PAIRS - 1
        return (0, self.features[number]) if number in self.features else (INVALID_FIELD, 0)

    def _identify(self, entry: bytes) -> Outcome:
        (nsid,), (prp1, prp2) = struct.unpack_from("<I", entry, 4), _pointers(entry)
        cns = entry[40]
        page = bytearray(PAGE)
        if cns == 0x01:
            self._tell_controller(page)
        elif cns == 0x02:
            later = [one for one in self.nsids if one > nsid][:1024]
            page[: 4 * len(later)] = struct.pack(f"<{len(later)}I", *later)
        elif nsid not in self.nsids:
            return _INVALID_NAMESPACE, 0
        elif cns == 0x03:
            page[:5] = struct.pack("<BBxxB", 4, 1, self.sets_of[nsid])
        else:
            struct.pack_into("<QQQ", page, 0, self.blocks, self.blocks, self.blocks)
            page[128:131] = struct.pack("<HB", self.metadata, self.shift)
        self._scatter(self.pieces(prp1, prp2, PAGE), bytes(page))
        return 0, 0

    def _tell_controller(self, page: bytearray) -> None:
        struct.pack_into("<HH", page, 0, 0x1B36, 0x1AF4)
        page[4:24], page[24:64] = self.serial.ljust(20), self.model_name.ljust(40)
        page[64:72] = self.firmware.ljust(8)
        page[77] = self.max_transfer_exponent
        struct.pack_into("<III", page, 80, self.version, 0, self.rtd3e_us)
        # One abort, four events, a volatile write cache; compare, trim, zeroes, features, copy.
        page[258], page[259], page[525] = 0, 3, 1
        page[512], page[513] = 0x66, 0x44
        struct.pack_into("<I", page, 516, max(self.nsids, default=1))
        struct.pack_into("<H", page, 520, 0x10D)
        # Of one name a host makes one subsystem, whose controllers may not have the same number.
        page[768:1024] = (b"nqn.2026-11.vfiotool:" + self.serial).ljust(256, b"\0")[:256]

    def io_command(self, opcode: int, entry: bytes) -> Outcome:
        """Run an I/O command's 64 bytes."""
        prp1, prp2, lba = struct.unpack_from("<QQQ", entry, 24)
        blocks = struct.unpack_from("<H", entry, 48)[0] + 1
        if opcode == 0:
            return 0, 0
        if opcode == 0x09:
            return self._trim(struct.unpack_from("<I", entry, 40)[0], prp1), 0
        if opcode == 0x19:
            return self._copy(lba, entry[48] + 1, prp1), 0
        if opcode not in (0x01, 0x02, 0x05, 0x08, 0x0C):
            return INVALID_OPCODE, 0
        if lba + blocks > self.blocks:
            return _LBA_OUT_OF_RANGE, 0
        at, size = lba << self.shift, blocks << self.shift
        if opcode == 0x08:
            self.disk[at : at + size] = bytes(size)
        if opcode in (0x08, 0x0C):
            return 0, 0
        places = self._scattered(entry) if entry[1] >> 6 else self.pieces(prp1, prp2, size)
        if places is None or sum(length for _, length in places) < size:
            return INVALID_FIELD, 0
        if opcode == 0x02:
            self._scatter(places, memoryview(self.disk)[at : at + size])
            return 0, 0
        data = b"".join(self.dma_read(iova, length) for iova, length in places)[:size]
        if opcode == 0x01:
            self.disk[at : at + size] = data
        elif data != self.disk[at : at + size]:
            return _COMPARE_FAILED, 0
        return 0, 0

    def _scatter(
        self, places: list[tuple[int, int]] | None, data: bytes | bytearray | memoryview
    ) -> None:
        at = 0
        for iova, length in places or ():
            part = data[at : at + length]
            if part:
                self.dma_write(iova, part)
            at += length

    def _trim(self, count: int, iova: int) -> int:
        rows = self.dma_read(iova, 16 * ((count & 0xFF) + 1))
        for _, blocks, lba in struct.iter_unpack("<IIQ", rows):
            if lba + blocks > self.blocks:
                return _LBA_OUT_OF_RANGE
            at, size = lba << self.shift, blocks << self.shift
            self.disk[at : at + size] = bytes(size)
        return 0

    def _copy(self, to: int, count: int, iova: int) -> int:
        data = b""
        for number in range(count):
            row = self.dma_read(iova + 32 * number, 32)
            lba, blocks = struct.unpack_from("<8xQH", row)
            if lba + blocks + 1 > self.blocks:
                return _LBA_OUT_OF_RANGE
            data += self.disk[lba << self.shift : (lba + blocks + 1) << self.shift]
        if (to << self.shift) + len(data) > len(self.disk):
            return _LBA_OUT_OF_RANGE
        self.disk[to << self.shift : (to << self.shift) + len(data)] = data
        return 0

    def _scattered(self, entry: bytes) -> list[tuple[int, int]] | None:
        """Where a command's data lies by its scatter list (4.1.2): one descriptor, or a last
        segment of descriptors; None for other lists."""
        iova, length = struct.unpack_from("<QI", entry, 24)
        if entry[39] >> 4 == 0:
            return [(iova, length)]
        if entry[39] >> 4 != 3 or length % 16 or length > PAGE:
            return None
        raw = self.dma_read(iova, length)
        return [struct.unpack_from("<QI", raw, at) for at in range(0, length, 16)]

    def pieces(self, prp1: int, prp2: int, size: int) -> list[tuple[int, int]] | None:
        """Where a command's data lies, page by page (4.1.1); None for lists that cannot be. A list
        that does not end in its page goes on in the next, which its last entry names."""
        first = min(size, PAGE - prp1 % PAGE)
        found, left = [(prp1, first)], size - first
        if not left:
            return found
        if left <= PAGE:
            entries = [prp2]
        else:
            entries, place = [], prp2
            needed = -(-left // PAGE)
            while needed:
                room = (PAGE - place % PAGE) // 8
                more = room < needed
                count = room if more else needed
                row = list(struct.unpack(f"<{count}Q", self.dma_read(place, 8 * count)))
                if more:
                    place = row.pop()
                    if not row:
                        return None
                entries += row
                needed -= len(row)
        for iova in entries:
            if iova % PAGE:
                return None
            found.append((iova, min(left, PAGE)))
            left -= PAGE
        return found


def _creation(entry: bytes) -> tuple[int, int, int, int]:
    """Of a command that creates a queue: base, number, entries, dword 11."""
    (base,) = struct.unpack_from("<Q", entry, 24)
    ten, eleven = struct.unpack_from("<II", entry, 40)
    return base, ten & 0xFFFF, (ten >> 16) + 1, eleven


def _pointers(entry: bytes) -> tuple[int, int]:
    prp1, prp2 = struct.unpack_from("<QQ", entry, 24)
    return prp1, prp2


def _smart() -> bytes:
    """Log 2, SMART (5.16.1.3): 26 degrees, all spare, nothing used."""
    log = bytearray(512)
    struct.pack_into("<BHBBB", log, 0, 0, 299, 100, 10, 0)
    return bytes(log)
