"""What the NVMe specifications fix: registers, commands and their numbers.

Sources: NVM Express Base Specification 2.0 (sections by number below), NVM Command Set
Specification 1.0. Everything here is a pure value; `controller.py` is the driver.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vfiotool.errors import UsageError
from vfiotool.vfio import Register, RegisterMap

CLASS_CODE = 0x010802  # PCI Code and ID Assignment 1.11, 1.9: NVM Express I/O controller
DOORBELLS = 0x1000
# I/O commands: NVM Command Set 1.0, section 3.2.
FLUSH, WRITE, READ, WRITE_ZEROES = 0x00, 0x01, 0x02, 0x08
WRITE_UNCORRECTABLE, COMPARE, DATASET_MANAGEMENT, VERIFY, COPY = 0x04, 0x05, 0x09, 0x0C, 0x19
# Zoned Namespace Command Set 1.1, section 3.4.
ZONE_SEND, ZONE_RECEIVE, ZONE_APPEND = 0x79, 0x7A, 0x7D
FORCE_UNIT_ACCESS = 1 << 14
LIMITED_RETRY = 1 << 15
# Protection information of a command, in `control` (NVM Command Set 1.0, 5.2.2): PRACT has the
# controller insert or strip it, PRCHK what it checks: guard, application tag, reference tag.
PRACT, PRCHK_GUARD, PRCHK_APP, PRCHK_REF = 1 << 13, 1 << 12, 1 << 11, 1 << 10
# Admin commands: Base Specification 2.0, figure 138.
DELETE_SQ, CREATE_SQ, DELETE_CQ, CREATE_CQ = 0x00, 0x01, 0x04, 0x05
IDENTIFY, SET_FEATURES, VIRTUALIZATION, DOORBELL_BUFFERS = 0x06, 0x09, 0x1C, 0x7C
GET_LOG_PAGE, ABORT, GET_FEATURES, ASYNC_EVENT = 0x02, 0x08, 0x0A, 0x0C
NAMESPACE_MANAGEMENT, FIRMWARE_COMMIT, FIRMWARE_DOWNLOAD = 0x0D, 0x10, 0x11
NAMESPACE_ATTACHMENT, FORMAT, SANITIZE = 0x15, 0x80, 0x84
# Identify's CNS values: figure 273.
CNS_NAMESPACE, CNS_CONTROLLER, CNS_ACTIVE_NAMESPACES = 0x00, 0x01, 0x02
CNS_DESCRIPTORS, CNS_NAMESPACE_OF_SET, CNS_CONTROLLER_OF_SET = 0x03, 0x05, 0x06
CNS_ALLOCATED_NAMESPACES, CNS_ALLOCATED_NAMESPACE = 0x10, 0x11
CNS_NAMESPACE_CONTROLLERS, CNS_CONTROLLERS = 0x12, 0x13
CNS_PRIMARY_CAPABILITIES, CNS_SECONDARY_CONTROLLERS = 0x14, 0x15
FEATURE_QUEUES = 0x07
# Virtualization Management, 5.25: actions and resources.
ASSIGN_PRIMARY, SECONDARY_OFFLINE, ASSIGN_SECONDARY, SECONDARY_ONLINE = 1, 7, 8, 9
QUEUE_RESOURCES, INTERRUPT_RESOURCES = 0, 1

# Priority of a submission queue where arbitration is weighted: 5.4, figure 161.
PRIORITIES = {"urgent": 0, "high": 1, "medium": 2, "low": 3}

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
            "arbitration": (18, 17),
            "timeout": (31, 24),
            "stride": (35, 32),
            "command_sets": (44, 37),
            "page_min": (51, 48),
            "page_max": (55, 52),
            "memory_buffer": (57, 57),
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
            "arbitration": (13, 11),
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
    # The Controller Memory Buffer, 3.1.3.11 ff.: CMBLOC, CMBSZ, CMBMSC in two halves, CMBSTS.
    memory_location = Register(0x38, access="ro")
    memory_size = Register(0x3C, access="ro")
    memory_control = Register(0x50)
    memory_control_high = Register(0x54)
    memory_status = Register(0x58, access="ro", fields={"invalid_address": (0, 0)})


def command(
    opcode: int,
    nsid: int = 0,
    *,
    prp1: int = 0,
    prp2: int = 0,
    dwords: tuple[int, ...] = (),
    flags: int = 0,
    metadata: int = 0,
) -> bytes:
    """A command's 64 bytes; `dwords` are those from dword 10 on, `flags` the bits of dword 0 that
    follow the opcode, `metadata` the metadata pointer. Raises UsageError for what a field of it
    cannot hold."""
    rest = (*dwords, *(0,) * (6 - len(dwords)))
    try:
        return _COMMAND.pack(opcode, flags, 0, nsid, metadata, prp1, prp2, *rest)
    except struct.error as error:
        named = {"opcode": (opcode, 8), "flags": (flags, 8), "nsid": (nsid, 32)}
        named |= {"metadata": (metadata, 64), "prp1": (prp1, 64), "prp2": (prp2, 64)}
        named |= {f"dword {10 + at}": (dword, 32) for at, dword in enumerate(rest)}
        raise unfit(named.items()) from error


def unfit(fields: Iterable[tuple[str, tuple[object, int]]]) -> UsageError:
    """The error for a command one of whose fields, (name, (number, bits)), cannot hold its number:
    it names that field and its range."""
    for name, (number, bits) in fields:
        if not isinstance(number, int) or not 0 <= number < 1 << bits:
            given = f"{number:#x}" if isinstance(number, int) else repr(number)
            return UsageError(f"{name} {given[:40]} is not a number from 0 to {(1 << bits) - 1:#x}")
    return UsageError("a field of the command cannot hold its number")
