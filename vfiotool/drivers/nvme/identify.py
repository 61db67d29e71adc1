"""What Identify tells: the controller, namespaces, a PF's secondary controllers.

Sources: NVM Express Base Specification 2.0, 5.17; NVM Command Set Specification 1.0, 4.1.5.
Everything here is a pure value, and survives whatever a device sends.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from vfiotool.errors import KernelError, Unsupported, UsageError


def text(raw: bytes) -> str:
    """An ASCII field of Identify, without its padding; a device can put anything there."""
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in raw.rstrip(b" \0"))


# Base Specification 2.0, 3.1.3.5 and figure 277: command set identifiers.
COMMAND_SETS = {0: "nvm", 1: "key-value", 2: "zoned"}


def namespace_list(page_after: Callable[[int], bytes]) -> list[int]:
    """All identifiers of a list (5.17.2.2) that comes in pages of 1,024, each beginning above the
    identifier it is asked for."""
    found: list[int] = []
    while True:
        page = [nsid for (nsid,) in struct.iter_unpack("<I", page_after(found[-1] if found else 0))]
        fresh = [nsid for nsid in page if nsid > (found[-1] if found else 0)]
        found += sorted(set(fresh))
        if not fresh or not all(page) or found[-1] >= 0xFFFFFFFE or len(fresh) < len(page):
            return found


def command_set_of(descriptors: bytes) -> int:
    """The command set that a Namespace Identification Descriptor list (5.17.2.3) names; 0, the NVM
    command set, where it names none."""
    at = 0
    while at + 4 < len(descriptors) and descriptors[at]:
        if descriptors[at] == 4:
            return descriptors[at + 4]
        at += 4 + descriptors[at + 1]
    return 0


@dataclass(frozen=True, slots=True)
class ControllerIdentity:
    """Identify Controller (figure 275). `max_transfer_pages` counts pages of CAP.MPSMIN, None
    is no limit; the flags tell optional commands. `shutdown_s` is RTD3E, 0 where not told;
    `events_limit` how many Asynchronous Event Requests may be out; `sgl` whether data can be told
    by scatter lists. `fields` has all of them under their names in the specification."""

    vendor: int
    serial: str
    model: str
    firmware: str
    controller_id: int
    max_transfer_pages: int | None
    namespaces: int
    volatile_write_cache: bool
    virtualization: bool
    doorbell_buffers: bool
    shutdown_s: float = 0.0
    events_limit: int = 1
    sgl: bool = False
    optional_admin: int = 0
    optional_io: int = 0
    raw: bytes = field(default=b"", repr=False, compare=False)

    @classmethod
    def parse(cls, raw: bytes) -> ControllerIdentity:
        (vendor,) = struct.unpack_from("<H", raw, 0)
        limit, controller_id = struct.unpack_from("<BH", raw, 77)
        (optional,) = struct.unpack_from("<H", raw, 256)
        namespaces, optional_io = struct.unpack_from("<IH", raw, 516)
        (shutdown,) = struct.unpack_from("<I", raw, 88)
        (sgls,) = struct.unpack_from("<I", raw, 536)
        return cls(
            vendor=vendor,
            serial=text(raw[4:24]),
            model=text(raw[24:64]),
            firmware=text(raw[64:72]),
            controller_id=controller_id,
            max_transfer_pages=1 << limit if 0 < limit < 32 else None,
            namespaces=namespaces,
            volatile_write_cache=bool(raw[525] & 1),
            virtualization=bool(optional >> 7 & 1),
            doorbell_buffers=bool(optional >> 8 & 1),
            shutdown_s=shutdown / 1e6,
            events_limit=raw[259] + 1,
            sgl=bool(sgls & 3),
            optional_admin=optional,
            optional_io=optional_io,
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace: `blocks` of `block_bytes` each (Identify Namespace, NVM Command Set 1.0,
    figure 97), each with `metadata_bytes` of metadata: behind the block's data where `extended`,
    in a buffer of its own otherwise. `protection` is the type of end-to-end protection (0: none),
    `protection_first` whether its 8 bytes lead the metadata; `command_set` 0 is NVM, 2 zoned."""

    nsid: int
    blocks: int
    block_bytes: int
    metadata_bytes: int = 0
    extended: bool = False
    protection: int = 0
    protection_first: bool = False
    command_set: int = 0

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def transfer_bytes(self) -> int:
        """Bytes that a block takes in a data buffer."""
        return self.block_bytes + (self.metadata_bytes if self.extended else 0)

    def refuse_metadata(self) -> None:
        """Raises Unsupported for blocks with metadata: for plain reads and writes."""
        if self.metadata_bytes:
            raise Unsupported(
                f"the blocks of namespace {self.nsid} carry {self.metadata_bytes} bytes of "
                "metadata",
                hint="IoQueue.transfer moves blocks with their metadata",
            )

    @classmethod
    def parse(cls, nsid: int, raw: bytes, command_set: int = 0) -> Namespace:
        """Raises UsageError for a namespace that is not active (all zero), KernelError for a block
        size that cannot be."""
        (blocks,) = struct.unpack_from("<Q", raw, 0)
        if not blocks:
            raise UsageError(f"namespace {nsid} is not active")
        flags = raw[26]
        index = flags & 0xF | (flags >> 5 & 3) << 4
        metadata, shift = struct.unpack_from("<HB", raw, 128 + 4 * index)
        if not 9 <= shift <= 16:
            raise KernelError(f"namespace {nsid} claims blocks of 2^{shift} bytes")
        return cls(
            nsid,
            blocks,
            1 << shift,
            metadata,
            bool(metadata and flags >> 4 & 1),
            raw[29] & 7 if metadata else 0,
            bool(metadata and raw[29] >> 3 & 1),
            command_set,
        )


@dataclass(frozen=True, slots=True)
class SecondaryController:
    """An entry of the Secondary Controller List (figure 280): a VF as its PF sees it."""

    controller_id: int
    online: bool
    vf_number: int
    queues: int
    interrupts: int

    @staticmethod
    def parse_list(raw: bytes) -> list[SecondaryController]:
        found = []
        for index in range(min(raw[0], 127)):
            entry = struct.unpack_from("<HHB3xHHH", raw, 32 + 32 * index)
            controller_id, _, state, vf_number, queues, interrupts = entry
            online = bool(state & 1)
            found.append(SecondaryController(controller_id, online, vf_number, queues, interrupts))
        return found
