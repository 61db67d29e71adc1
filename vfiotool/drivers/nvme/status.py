"""The status of a completion, in words.

Sources: NVM Express Base Specification 2.0, 4.2.3 (figures 93 to 97); NVM Command Set
Specification 1.0, 2.3; Zoned Namespace Command Set Specification 1.1, 3.4.1.
"""

from __future__ import annotations

from vfiotool.errors import KernelError

# Path Related, Command Aborted By Host: what commands end with that a reset took.
ABORTED_BY_HOST = 3 << 8 | 0x71
# (type, code) -> name.
STATUS_NAMES = {
    (0, 0x01): "invalid command opcode",
    (0, 0x02): "invalid field in command",
    (0, 0x03): "command identifier conflict",
    (0, 0x04): "data transfer error",
    (0, 0x05): "aborted for loss of power",
    (0, 0x06): "internal error",
    (0, 0x07): "abort requested",
    (0, 0x08): "aborted: its queue was deleted",
    (0, 0x09): "aborted: a fused command failed",
    (0, 0x0A): "aborted: a fused command is missing",
    (0, 0x0B): "invalid namespace or format",
    (0, 0x0C): "command sequence error",
    (0, 0x0D): "invalid SGL segment descriptor",
    (0, 0x0E): "invalid number of SGL descriptors",
    (0, 0x0F): "data SGL length invalid",
    (0, 0x10): "metadata SGL length invalid",
    (0, 0x11): "SGL descriptor type invalid",
    (0, 0x12): "invalid use of the controller memory buffer",
    (0, 0x13): "invalid offset of a data pointer",
    (0, 0x14): "atomic write unit exceeded",
    (0, 0x15): "operation denied",
    (0, 0x16): "SGL offset invalid",
    (0, 0x1B): "SGL data block granularity invalid",
    (0, 0x1C): "command not supported for a queue in the memory buffer",
    (0, 0x1D): "sanitize failed",
    (0, 0x1E): "sanitize in progress",
    (0, 0x20): "namespace is write protected",
    (0, 0x21): "command interrupted",
    (0, 0x22): "transient transport error",
    (0, 0x23): "prohibited by command and feature lockdown",
    (0, 0x24): "admin command: media not ready",
    (0, 0x80): "block address out of range",
    (0, 0x81): "capacity exceeded",
    (0, 0x82): "namespace not ready",
    (0, 0x83): "reservation conflict",
    (0, 0x84): "format in progress",
    (1, 0x00): "invalid completion queue",
    (1, 0x01): "invalid queue identifier",
    (1, 0x02): "invalid queue size",
    (1, 0x03): "abort command limit exceeded",
    (1, 0x05): "asynchronous event request limit exceeded",
    (1, 0x06): "invalid firmware slot",
    (1, 0x07): "invalid firmware image",
    (1, 0x08): "invalid interrupt vector",
    (1, 0x09): "invalid log page",
    (1, 0x0A): "invalid format",
    (1, 0x0B): "firmware activation needs a conventional reset",
    (1, 0x0C): "invalid queue deletion",
    (1, 0x0D): "feature identifier cannot be saved",
    (1, 0x0E): "feature cannot be changed",
    (1, 0x0F): "feature is not namespace specific",
    (1, 0x10): "firmware activation needs an NVM subsystem reset",
    (1, 0x11): "firmware activation needs a controller level reset",
    (1, 0x12): "firmware activation exceeds the maximum time",
    (1, 0x13): "firmware activation prohibited",
    (1, 0x14): "overlapping range",
    (1, 0x15): "insufficient capacity for the namespace",
    (1, 0x16): "no namespace identifier available",
    (1, 0x18): "namespace already attached",
    (1, 0x19): "namespace is private",
    (1, 0x1A): "namespace is not attached",
    (1, 0x1B): "thin provisioning not supported",
    (1, 0x1C): "controller list invalid",
    (1, 0x1D): "device self-test in progress",
    (1, 0x1E): "boot partition write prohibited",
    (1, 0x1F): "invalid controller identifier",
    (1, 0x20): "invalid secondary controller state",
    (1, 0x21): "invalid number of controller resources",
    (1, 0x22): "invalid resource identifier",
    (1, 0x29): "I/O command set not supported",
    (1, 0x2B): "I/O command set combination rejected",
    (1, 0x80): "conflicting attributes",
    (1, 0x81): "invalid protection information",
    (1, 0x82): "write to a read only range",
    (1, 0x83): "command size limit exceeded",
    (1, 0xB8): "zone boundary error",
    (1, 0xB9): "zone is full",
    (1, 0xBA): "zone is read only",
    (1, 0xBB): "zone is offline",
    (1, 0xBC): "zone invalid write",
    (1, 0xBD): "too many active zones",
    (1, 0xBE): "too many open zones",
    (1, 0xBF): "invalid zone state transition",
    (2, 0x80): "write fault",
    (2, 0x81): "unrecovered read error",
    (2, 0x82): "end-to-end guard check error",
    (2, 0x83): "end-to-end application tag check error",
    (2, 0x84): "end-to-end reference tag check error",
    (2, 0x85): "compare failure",
    (2, 0x86): "access denied",
    (2, 0x87): "deallocated or unwritten logical block",
    (3, 0x00): "internal path error",
    (3, 0x70): "host pathing error",
    (3, 0x71): "aborted by the host: the controller was reset",
}


def failed_with(status: int, what: str) -> KernelError:
    """The error of a command that the controller failed with `status`."""
    kind, code = status >> 8 & 7, status & 0xFF
    name = STATUS_NAMES.get((kind, code), "no name known")
    final = "; do not retry" if status >> 14 & 1 else ""
    return KernelError(f"{what} failed: {name} (type {kind}, code {code:#x}{final})")
