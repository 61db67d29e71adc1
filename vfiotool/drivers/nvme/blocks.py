"""I/O commands beyond read, write and flush, on an `IoQueue`; data in several buffers, metadata,
protection information; zoned namespaces.

Sources: NVM Command Set Specification 1.0 (3.2, 5.2); Zoned Namespace Command Set 1.1 (3.4). Every
function waits for its own command, and raises KernelError with the controller's words.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.identify import Namespace
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.pointers import USE_SGL, Segment, pages_of, prp, sgl
from vfiotool.drivers.nvme.queue_pair import Completion
from vfiotool.errors import UsageError

_PAGE = 4096
_BLOCKS_LIMIT = 65536
ZONE_STATES = {
    1: "empty", 2: "implicitly-open", 3: "explicitly-open", 4: "closed", 13: "read-only",
    14: "full", 15: "offline",
}  # fmt: skip
_NAMES = {
    nvme_spec.READ: "read", nvme_spec.WRITE: "write", nvme_spec.COMPARE: "compare",
    nvme_spec.ZONE_APPEND: "zone append",
}  # fmt: skip
ZONE_ACTIONS = {"close": 1, "finish": 2, "open": 3, "reset": 4, "offline": 5}


def _range(disk: Namespace, lba: int, blocks: int, limit: int = _BLOCKS_LIMIT) -> None:
    if lba < 0 or not 1 <= blocks <= limit or lba + blocks > disk.blocks:
        raise UsageError(
            f"blocks {lba} to {lba + blocks} of a disk of {disk.blocks}, {limit} in a command"
        )


def _simple(
    queue: IoQueue, opcode: int, disk: Namespace, lba: int, blocks: int, what: str, control: int = 0
) -> None:
    _range(disk, lba, blocks)
    dwords = (lba & 0xFFFFFFFF, lba >> 32, blocks - 1 | control << 16)
    named = f"{what} of blocks {lba} to {lba + blocks - 1}"
    queue.run(nvme_spec.command(opcode, disk.nsid, dwords=dwords), named)


def write_zeroes(
    queue: IoQueue, disk: Namespace, lba: int, blocks: int, *, deallocate: bool = False
) -> None:
    """Have blocks read as zeroes (3.2.8), without data; `deallocate` may free their space."""
    control = 1 << 9 if deallocate else 0
    _simple(queue, nvme_spec.WRITE_ZEROES, disk, lba, blocks, "write zeroes", control)


def write_uncorrectable(queue: IoQueue, disk: Namespace, lba: int, blocks: int) -> None:
    """Have blocks fail to read until they are written again (3.2.7)."""
    _simple(queue, nvme_spec.WRITE_UNCORRECTABLE, disk, lba, blocks, "write uncorrectable")


def verify(queue: IoQueue, disk: Namespace, lba: int, blocks: int) -> None:
    """Have the controller read blocks and check their integrity, without transfer (3.2.6)."""
    _simple(queue, nvme_spec.VERIFY, disk, lba, blocks, "verify")


def compare(queue: IoQueue, disk: Namespace, lba: int, data: bytes) -> None:
    """Compare blocks with `data` (3.2.1). Raises KernelError "compare failure" if they differ."""
    if not data or len(data) % disk.block_bytes:
        raise UsageError(f"{len(data)} bytes are not whole blocks of {disk.block_bytes}")
    disk.refuse_metadata()
    with queue.device.dma.alloc(len(data)) as memory:
        memory.view[: len(data)] = data
        segments = [Segment(memory, 0, len(data))]
        transfer(queue, nvme_spec.COMPARE, disk, lba, len(data) // disk.block_bytes, segments)


def trim(queue: IoQueue, disk: Namespace, ranges: Sequence[tuple[int, int]]) -> None:
    """Deallocate ranges of (lba, blocks), up to 256 (Dataset Management, 3.2.3). What is read there
    afterwards is the controller's choice (DLFEAT)."""
    if not 1 <= len(ranges) <= 256:
        raise UsageError(f"{len(ranges)} ranges; a command takes 1 to 256")
    for lba, blocks in ranges:
        _range(disk, lba, blocks, 0xFFFFFFFF)
    with queue.device.dma.alloc(_PAGE) as memory:
        for number, (lba, blocks) in enumerate(ranges):
            struct.pack_into("<IIQ", memory.view, 16 * number, 0, blocks, lba)
        command = nvme_spec.command(
            nvme_spec.DATASET_MANAGEMENT,
            disk.nsid,
            prp1=memory.iova,
            dwords=(len(ranges) - 1, 1 << 2),
        )
        queue.run(command, "trim", holds=(memory,))


def copy(queue: IoQueue, disk: Namespace, to: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Copy ranges of (lba, blocks) one after the other to blocks from `to` on, within the
    controller (3.2.2, descriptor format 0)."""
    if not 1 <= len(ranges) <= 128:
        raise UsageError(f"{len(ranges)} ranges; a command takes 1 to 128")
    for lba, blocks in ranges:
        _range(disk, lba, blocks)
    _range(disk, to, sum(blocks for _, blocks in ranges), 0xFFFFFFFF)
    with queue.device.dma.alloc(_PAGE) as memory:
        for number, (lba, blocks) in enumerate(ranges):
            struct.pack_into("<QH", memory.view, 32 * number + 8, lba, blocks - 1)
        command = nvme_spec.command(
            nvme_spec.COPY,
            disk.nsid,
            prp1=memory.iova,
            dwords=(to & 0xFFFFFFFF, to >> 32, len(ranges) - 1),
        )
        queue.run(command, f"copy to blocks {to} and on", holds=(memory,))


def _check_data(
    queue: IoQueue,
    disk: Namespace,
    blocks: int,
    segments: Sequence[Segment],
    metadata: Segment | None,
    control: int,
) -> None:
    stripped = bool(control & nvme_spec.PRACT and disk.metadata_bytes == 8)
    size = blocks * (disk.block_bytes if stripped else disk.transfer_bytes)
    if sum(segment.size for segment in segments) != size:
        raise UsageError(f"{blocks} blocks are {size} bytes, the segments are not")
    if size > queue.max_transfer:
        raise UsageError(f"{size} bytes; the controller takes {queue.max_transfer}")
    needs = disk.metadata_bytes and not disk.extended and not stripped
    if bool(needs) != (metadata is not None):
        raise UsageError(
            f"namespace {disk.nsid} has {disk.metadata_bytes} bytes of metadata a block: "
            + ("give a buffer for it" if needs else "no buffer for it is wanted")
        )
    if metadata is not None:
        metadata.check()
        if metadata.size < blocks * disk.metadata_bytes:
            raise UsageError(f"{blocks} blocks have {blocks * disk.metadata_bytes} of metadata")


def transfer(
    queue: IoQueue,
    opcode: int,
    disk: Namespace,
    lba: int,
    blocks: int,
    segments: Sequence[Segment],
    *,
    metadata: Segment | None = None,
    control: int = 0,
    scatter: bool | None = None,
    reference: int | None = None,
    application: int = 0,
    application_mask: int = 0,
) -> Completion:
    """Run a command on blocks whose data lies in `segments`, in order: by PRPs where they can tell
    it, by a scatter list (SGL) otherwise or with `scatter`. Blocks with metadata of its own take
    `metadata`, blocks with it behind (`disk.extended`) have it in the data. `control` has FUA and
    the bits of protection information; `reference` is the initial reference tag (by default the
    block's number), `application` and its mask the application tag (5.2).

    Raises UsageError for data that does not fit blocks, buffers or controller.
    """
    _range(disk, lba, blocks)
    _check_data(queue, disk, blocks, segments, metadata, control)
    page = queue.pair.rings.page_bytes
    entries = None if scatter else pages_of(segments, page)
    if entries is None and scatter is False:
        raise UsageError("PRPs cannot tell these segments: only the first may begin within a page")
    tag = (lba if reference is None else reference) & 0xFFFFFFFF
    dwords = (
        lba & 0xFFFFFFFF,
        lba >> 32,
        blocks - 1 | control << 16,
        0,
        tag if disk.protection else 0,
        application | application_mask << 16,
    )
    room = max(_PAGE, 16 * len(segments), 8 * (len(entries or ()) + 8)) + page
    with queue.device.dma.alloc(room, align=page) as table:
        first, second = sgl(segments, table) if entries is None else prp(entries, table, page)
        command = nvme_spec.command(
            opcode,
            disk.nsid,
            prp1=first,
            prp2=second,
            dwords=dwords,
            flags=USE_SGL if entries is None else 0,
            metadata=0 if metadata is None else metadata.iova,
        )
        holds = [table, *(segment.buffer for segment in segments)]
        if metadata is not None:
            holds.append(metadata.buffer)
        name = _NAMES.get(opcode, f"opcode {opcode:#x}")
        what = f"{name} of blocks {lba} to {lba + blocks - 1}"
        return queue.run(command, what, holds=tuple(holds))


@dataclass(frozen=True, slots=True)
class Zone:
    """A zone (ZNS 1.1, figure 37): blocks, the first of them, and where to write next."""

    start: int
    capacity: int
    write_pointer: int
    state: str


def _zoned(disk: Namespace) -> None:
    if disk.command_set != 2:
        raise UsageError(f"namespace {disk.nsid} is not zoned")


def report_zones(queue: IoQueue, disk: Namespace, lba: int = 0, limit: int = 63) -> list[Zone]:
    """The zones from the one that holds `lba` on, up to `limit` (Zone Management Receive)."""
    _zoned(disk)
    size = min(64 + 64 * limit, queue.max_transfer) // 4 * 4
    with queue.device.dma.alloc(size) as memory:
        entries = pages_of([Segment(memory, 0, size)], queue.pair.rings.page_bytes) or []
        with queue.device.dma.alloc(8 * len(entries) + _PAGE) as table:
            first, second = prp(entries, table, queue.pair.rings.page_bytes)
            dwords = (lba & 0xFFFFFFFF, lba >> 32, size // 4 - 1, 1 << 16)
            command = nvme_spec.command(
                nvme_spec.ZONE_RECEIVE, disk.nsid, prp1=first, prp2=second, dwords=dwords
            )
            queue.run(command, "report of zones", holds=(memory, table))
        raw = bytes(memory.view[:size])
    (count,) = struct.unpack_from("<Q", raw, 0)
    found = []
    for number in range(min(count, limit, (size - 64) // 64)):
        state, capacity, start, pointer = struct.unpack_from("<xB6xQQQ", raw, 64 + 64 * number)
        name = ZONE_STATES.get(state >> 4, str(state >> 4))
        found.append(Zone(start, capacity, pointer, name))
    return found


def zone_action(
    queue: IoQueue, disk: Namespace, action: str, lba: int = 0, *, every: bool = False
) -> None:
    """Open, close, finish, reset or take offline the zone that begins at `lba`, or all. A reset
    loses what the zone holds."""
    _zoned(disk)
    if action not in ZONE_ACTIONS:
        raise UsageError(f"no zone action {action!r}", hint=f"one of {', '.join(ZONE_ACTIONS)}")
    dwords = (lba & 0xFFFFFFFF, lba >> 32, 0, ZONE_ACTIONS[action] | int(every) << 8)
    command = nvme_spec.command(nvme_spec.ZONE_SEND, disk.nsid, dwords=dwords)
    queue.run(command, f"zone {action}", timeout_s=120)


def zone_append(queue: IoQueue, disk: Namespace, start: int, data: bytes) -> int:
    """Append whole blocks to the zone that begins at `start`; the block where they went."""
    _zoned(disk)
    disk.refuse_metadata()
    blocks = len(data) // disk.block_bytes
    if not data or len(data) % disk.block_bytes:
        raise UsageError(f"{len(data)} bytes are not whole blocks of {disk.block_bytes}")
    with queue.device.dma.alloc(len(data)) as memory:
        memory.view[: len(data)] = data
        segments = [Segment(memory, 0, len(data))]
        return transfer(queue, nvme_spec.ZONE_APPEND, disk, start, blocks, segments).result
