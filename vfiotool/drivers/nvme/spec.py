"""What the NVMe specifications fix: registers, commands, the structures of Identify.

Sources: NVM Express Base Specification 2.0 (sections by number below), NVM Command Set
Specification 1.0. Everything here is a pure value; `nvme.py` is the driver.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vfiotool.errors import KernelError, Unsupported
from vfiotool.vfio.registers import Register, RegisterMap

DOORBELLS = 0x1000
# I/O commands: NVM Command Set 1.0, section 3.2.
FLUSH, WRITE, READ, WRITE_ZEROES = 0x00, 0x01, 0x02, 0x08
FORCE_UNIT_ACCESS = 1 << 14
# Admin commands: Base Specification 2.0, figure 138.
DELETE_SQ, CREATE_SQ, DELETE_CQ, CREATE_CQ = 0x00, 0x01, 0x04, 0x05
IDENTIFY, SET_FEATURES, VIRTUALIZATION, DOORBELL_BUFFERS = 0x06, 0x09, 0x1C, 0x7C
# Identify's CNS values: figure 273.
CNS_NAMESPACE, CNS_CONTROLLER, CNS_ACTIVE_NAMESPACES = 0x00, 0x01, 0x02
CNS_PRIMARY_CAPABILITIES, CNS_SECONDARY_CONTROLLERS = 0x14, 0x15
FEATURE_QUEUES = 0x07
# Virtualization Management, 5.25: actions and resources.
ASSIGN_PRIMARY, SECONDARY_OFFLINE, ASSIGN_SECONDARY, SECONDARY_ONLINE = 1, 7, 8, 9
QUEUE_RESOURCES, INTERRUPT_RESOURCES = 0, 1

_COMMAND = struct.Struct("<BBHI8xQQQ6I")


class NvmeRegisters(RegisterMap):
    """Section 3.1.3. 64-bit registers are accessed as two halves, low first (3.1)."""

    capabilities = Register(
        0x00,
        width=8,
        access="ro",
        halves=True,
        fields={
            "queue_entries": (15, 0),
            "contiguous": (16, 16),
            "timeout": (31, 24),
            "stride": (35, 32),
            "command_sets": (44, 37),
            "page_min": (51, 48),
            "page_max": (55, 52),
        },
    )
    version = Register(
        0x08, access="ro", fields={"major": (31, 16), "minor": (15, 8), "tertiary": (7, 0)}
    )
    configuration = Register(
        0x14,
        fields={
            "enable": (0, 0),
            "command_set": (6, 4),
            "page_size": (10, 7),
            "shutdown": (15, 14),
            "sq_entry_size": (19, 16),
            "cq_entry_size": (23, 20),
        },
    )
    status = Register(
        0x1C, access="ro", fields={"ready": (0, 0), "fatal": (1, 1), "shutdown": (3, 2)}
    )
    admin_queues = Register(0x24, fields={"sq_size": (11, 0), "cq_size": (27, 16)})
    admin_submission = Register(0x28, width=8, halves=True)
    admin_completion = Register(0x30, width=8, halves=True)


def command(
    opcode: int, nsid: int = 0, *, prp1: int = 0, prp2: int = 0, dwords: tuple[int, ...] = ()
) -> bytes:
    """A command's 64 bytes; `dwords` are those from dword 10 on."""
    rest = (*dwords, *(0,) * (6 - len(dwords)))
    return _COMMAND.pack(opcode, 0, 0, nsid, 0, prp1, prp2, *rest)


def _text(raw: bytes) -> str:
    """An ASCII field of Identify, without its padding; a device can put anything there."""
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in raw.rstrip(b" \0"))


@dataclass(frozen=True, slots=True)
class ControllerIdentity:
    """Identify Controller (figure 275). `max_transfer_pages` counts pages of CAP.MPSMIN, None
    is no limit; the flags tell optional admin commands."""

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

    @classmethod
    def parse(cls, raw: bytes) -> ControllerIdentity:
        (vendor,) = struct.unpack_from("<H", raw, 0)
        limit, controller_id = struct.unpack_from("<BH", raw, 77)
        (optional,) = struct.unpack_from("<H", raw, 256)
        (namespaces,) = struct.unpack_from("<I", raw, 516)
        return cls(
            vendor=vendor,
            serial=_text(raw[4:24]),
            model=_text(raw[24:64]),
            firmware=_text(raw[64:72]),
            controller_id=controller_id,
            max_transfer_pages=1 << limit if 0 < limit < 32 else None,
            namespaces=namespaces,
            volatile_write_cache=bool(raw[525] & 1),
            virtualization=bool(optional >> 7 & 1),
            doorbell_buffers=bool(optional >> 8 & 1),
        )


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace: `blocks` of `block_bytes` each (Identify Namespace, NVM Command Set 1.0,
    figure 97)."""

    nsid: int
    blocks: int
    block_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @classmethod
    def parse(cls, nsid: int, raw: bytes) -> Namespace:
        """Raises KernelError for a block size that cannot be, Unsupported for blocks that carry
        metadata."""
        (blocks,) = struct.unpack_from("<Q", raw, 0)
        flags = raw[26]
        index = flags & 0xF | (flags >> 5 & 3) << 4
        metadata, shift = struct.unpack_from("<HB", raw, 128 + 4 * index)
        if not 9 <= shift <= 16:
            raise KernelError(f"namespace {nsid} claims blocks of 2^{shift} bytes")
        if metadata:
            raise Unsupported(f"the blocks of namespace {nsid} carry {metadata} bytes of metadata")
        return cls(nsid, blocks, 1 << shift)


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
