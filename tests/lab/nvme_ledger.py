"""What the hostile NVMe tests in guests share: blocks that name their place, and a record of what
each of them may hold by now."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vfiotool.drivers.nvme import Namespace
from vfiotool.drivers.nvme import spec as nvme_spec

BLOCK = 512
SPAN = 8192
# What the disk `bad` of the machine `odd-nvme` fails for ever (vfiotool/lab/machines.py).
BAD_READ, BAD_WRITE = 2048, 4096
UNREAD, WRITE_FAULT = 0x281, 0x280
_ZEROES = -1


def content(lba: int, version: int) -> bytes:
    """A block of the disk: no two are alike, of one version or of two."""
    return bytes(BLOCK) if version == _ZEROES else struct.pack("<QQ", lba, version) * 32


@dataclass(frozen=True)
class Command:
    """A read or write of `count` blocks from `lba` on, at `offset` of the buffer."""

    opcode: int
    lba: int
    count: int
    offset: int

    @property
    def size(self) -> int:
        return self.count * BLOCK

    def reaches(self, lba: int) -> bool:
        return self.lba <= lba < self.lba + self.count

    def status(self, failing: bool) -> int:
        """What it must end with, on the disk that fails or on another."""
        if failing and self.opcode == nvme_spec.READ and self.reaches(BAD_READ):
            return UNREAD
        if failing and self.opcode == nvme_spec.WRITE and self.reaches(BAD_WRITE):
            return WRITE_FAULT
        return 0


class Ledger:
    """The versions that each of the first `SPAN` blocks may hold."""

    def __init__(self) -> None:
        self.may: dict[int, set[int]] = {lba: {_ZEROES} for lba in range(SPAN)}

    def fill(self, queue: object, disk: Namespace, failing: bool) -> None:
        """Give every block its version 0, but for the one that takes no writes."""
        write = queue.write  # type: ignore[attr-defined]
        parts = [(0, BAD_WRITE), (BAD_WRITE + 1, SPAN)] if failing else [(0, SPAN)]
        for first, end in parts:
            write(disk, first, b"".join(content(lba, 0) for lba in range(first, end)))
            for lba in range(first, end):
                self.may[lba] = {0}

    def wrote(self, command: Command, version: int, *, surely: bool) -> None:
        """A write ended well, or else may have reached the disk or not."""
        for lba in range(command.lba, command.lba + command.count):
            self.may[lba] = {version} if surely else self.may[lba] | {version}

    def read(self, command: Command, data: bytes) -> list[int]:
        """The blocks of `data` that hold what they cannot. What a block was seen to hold is what it
        holds until it is written again."""
        wrong = []
        for n in range(command.count):
            lba = command.lba + n
            seen = {
                version
                for version in self.may[lba]
                if content(lba, version) == data[n * BLOCK : (n + 1) * BLOCK]
            }
            if not seen:
                wrong.append(lba)
            self.may[lba] = seen or self.may[lba]
        return wrong
