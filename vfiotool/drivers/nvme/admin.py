"""Admin commands beyond bring-up: logs, features, events, abort, format, sanitize, namespaces,
firmware.

Source: NVM Express Base Specification 2.0, sections by number. Every function raises KernelError
with the controller's words where it refuses or does not know the command. What destroys data says
so; nothing here asks before it does.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import namespace_list
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.pointers import Segment, pages_of, prp
from vfiotool.drivers.nvme.status import ABORTED_BY_HOST
from vfiotool.errors import UsageError

ALL_NAMESPACES = 0xFFFFFFFF
SLOW_S = 600.0  # format and namespace management may take minutes
_PAGE = 4096


class Log(IntEnum):
    """Log pages (5.16.1)."""

    SUPPORTED = 0x00
    ERROR = 0x01
    SMART = 0x02
    FIRMWARE = 0x03
    CHANGED_NAMESPACES = 0x04
    EFFECTS = 0x05
    SELF_TEST = 0x06
    ENDURANCE_GROUP = 0x09
    SANITIZE = 0x81


class Feature(IntEnum):
    """Features (5.27.1)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B
    TIMESTAMP = 0x0E
    HOST_BEHAVIOR = 0x16
    COMMAND_SET_PROFILE = 0x19


def _refuse_wide(**fields: tuple[int, int]) -> None:
    """Of each field its value and how many bits it has. Raises UsageError for a value that would
    reach into the field beside it, and ask for something else."""
    for name, (value, bits) in fields.items():
        if not 0 <= value < 1 << bits:
            raise UsageError(f"{name} is from 0 to {(1 << bits) - 1:#x}, not {value:#x}")


def log_page(
    controller: Controller,
    page: int,
    size: int,
    *,
    nsid: int = ALL_NAMESPACES,
    specific: int = 0,
    retain: bool = False,
    command_set: int = 0,
) -> bytes:
    """`size` bytes (whole dwords) of a log page (5.16), in pieces of a page where it is longer.
    `retain` keeps the asynchronous event that the page belongs to."""
    if size <= 0 or size % 4:
        raise UsageError(f"a log page of {size} bytes; it has whole dwords")
    _refuse_wide(page=(page, 8), specific=(specific, 7), command_set=(command_set, 8))
    found = b""
    while len(found) < size:
        length = min(_PAGE, size - len(found))
        numd = length // 4 - 1
        dwords = (
            page | specific << 8 | int(retain) << 15 | (numd & 0xFFFF) << 16,
            numd >> 16,
            len(found) & 0xFFFFFFFF,
            len(found) >> 32,
            command_set << 24,
        )
        what = f"log page {page:#x}"
        found += controller.fetch(nvme_spec.GET_LOG_PAGE, nsid, dwords, length, what)
    return found


def get_feature(
    controller: Controller,
    feature: int,
    *,
    nsid: int = 0,
    select: int = 0,
    dword11: int = 0,
    size: int = 0,
) -> tuple[int, bytes]:
    """A feature's value (5.15) and, where it has a structure, `size` bytes of it. `select`: 0 the
    current value, 1 the default, 2 the saved one, 3 what can be done with it."""
    _refuse_wide(feature=(feature, 8), select=(select, 3), dword11=(dword11, 32))
    dwords = (feature | select << 8, dword11)
    with controller.memory(max(_PAGE, size)) as page:
        command = nvme_spec.command(
            nvme_spec.GET_FEATURES, nsid, prp1=page.iova if size else 0, dwords=dwords
        )
        done = controller.admin(command, what=f"get feature {feature:#x}", holds=(page,))
        return done.result, bytes(page.view[:size])


def set_feature(
    controller: Controller,
    feature: int,
    value: int,
    *,
    nsid: int = 0,
    save: bool = False,
    dword12: int = 0,
    data: bytes = b"",
) -> int:
    """Set a feature (5.27); `save` keeps it over power cycles. Returns dword 0 of the answer."""
    _refuse_wide(feature=(feature, 8), value=(value, 32), dword12=(dword12, 32))
    dwords = (feature | int(save) << 31, value, dword12)
    with controller.memory(max(_PAGE, len(data))) as page:
        page.view[: len(data)] = data
        command = nvme_spec.command(
            nvme_spec.SET_FEATURES, nsid, prp1=page.iova if data else 0, dwords=dwords
        )
        what = f"set feature {feature:#x}"
        return controller.admin(command, what=what, holds=(page,)).result


def abort(controller: Controller, queue: IoQueue, tag: int) -> bool:
    """Abort the command that was sent on `queue` with `tag` (5.1): whether the controller did; its
    own completion comes in either case. Raises UsageError where none is out."""
    cid = queue.commands.identifier(tag)
    dwords = (queue.number | cid << 16,)
    done = controller.admin(nvme_spec.command(nvme_spec.ABORT, dwords=dwords), what="abort")
    return not done.result & 1


def format_namespace(
    controller: Controller,
    nsid: int,
    *,
    lbaf: int | None = None,
    erase: int = 0,
    protection: int = 0,
    protection_first: bool = False,
    extended: bool = False,
    timeout_s: float | None = SLOW_S,
) -> None:
    """Format a namespace (5.14): ALL DATA IS LOST. `lbaf` is one of its formats (None: the
    one in use), `erase` 1 for user data, 2 cryptographically; the rest is how metadata and
    protection are kept."""
    _refuse_wide(lbaf=(lbaf or 0, 6), erase=(erase, 3), protection=(protection, 3))
    if lbaf is None:
        flags = controller.identify(nvme_spec.CNS_NAMESPACE, nsid)[26]
        lbaf = flags & 0xF | (flags >> 5 & 3) << 4
    dword = (
        lbaf & 0xF
        | int(extended) << 4
        | protection << 5
        | int(protection_first) << 8
        | erase << 9
        | (lbaf >> 4 & 3) << 12
    )
    command = nvme_spec.command(nvme_spec.FORMAT, nsid, dwords=(dword,))
    controller.admin(command, timeout_s, what=f"format of namespace {nsid}")


def sanitize(
    controller: Controller,
    action: int,
    *,
    passes: int = 1,
    pattern: int = 0,
    invert: bool = False,
    no_deallocate: bool = False,
    unrestricted: bool = False,
) -> None:
    """Begin to sanitize the whole subsystem (5.24): ALL DATA IS LOST. `action` 2 erases blocks, 3
    overwrites, 4 erases cryptographically, 1 leaves the failure mode, 5 too where it was
    `unrestricted`. It goes on in the background: the log page tells its progress."""
    _refuse_wide(action=(action, 3), pattern=(pattern, 32))
    if not 0 <= passes <= 16:
        raise UsageError(f"1 to 16 passes (0 are 16 too), not {passes}")
    dword = (
        action
        | int(unrestricted) << 3
        | (passes & 0xF) << 4
        | int(invert) << 8
        | int(no_deallocate) << 9
    )
    command = nvme_spec.command(nvme_spec.SANITIZE, dwords=(dword, pattern))
    controller.admin(command, what="sanitize")


def allocated_namespaces(controller: Controller) -> list[int]:
    """The identifiers of all namespaces that there are, attached or not (5.17.2.9)."""
    return namespace_list(partial(controller.identify, nvme_spec.CNS_ALLOCATED_NAMESPACES))


def create_namespace(
    controller: Controller,
    blocks: int,
    *,
    capacity: int | None = None,
    lbaf: int = 0,
    protection: int = 0,
    shared: bool = False,
    command_set: int = 0,
) -> int:
    """Create a namespace of `blocks` blocks (5.23); its identifier. It is attached to nothing."""
    data = bytearray(_PAGE)
    struct.pack_into("<QQ", data, 0, blocks, blocks if capacity is None else capacity)
    data[26], data[29], data[30] = lbaf & 0xF | (lbaf >> 4 & 3) << 5, protection, int(shared)
    with controller.memory(_PAGE) as page:
        page.view[:_PAGE] = data
        dwords = (0, command_set << 24)
        command = nvme_spec.command(nvme_spec.NAMESPACE_MANAGEMENT, prp1=page.iova, dwords=dwords)
        what = "creation of a namespace"
        return controller.admin(command, SLOW_S, what=what, holds=(page,)).result


def delete_namespace(controller: Controller, nsid: int) -> None:
    """Delete a namespace (5.23): ALL ITS DATA IS LOST."""
    command = nvme_spec.command(nvme_spec.NAMESPACE_MANAGEMENT, nsid, dwords=(1,))
    controller.admin(command, SLOW_S, what=f"deletion of namespace {nsid}")


def attach(
    controller: Controller,
    nsid: int,
    controllers: Sequence[int] = (),
    *,
    detach: bool = False,
) -> None:
    """Attach a namespace to controllers (5.22), this one where none is named, or detach it."""
    ids = list(controllers) or [controller.identity.controller_id]
    with controller.memory(_PAGE) as page:
        struct.pack_into(f"<{1 + len(ids)}H", page.view, 0, len(ids), *ids)
        command = nvme_spec.command(
            nvme_spec.NAMESPACE_ATTACHMENT, nsid, prp1=page.iova, dwords=(int(detach),)
        )
        verb = "detaching" if detach else "attaching"
        controller.admin(command, SLOW_S, what=f"{verb} namespace {nsid}", holds=(page,))


def firmware_download(controller: Controller, image: bytes, *, offset: int = 0) -> None:
    """Hand an image over (5.13), in pieces as FWUG has them; nothing changes until the commit."""
    if not image or len(image) % 4 or offset % 4:
        raise UsageError(f"a firmware image of {len(image)} bytes; it has whole dwords")
    granularity = controller.identity.raw[319]
    pages = 1 if granularity in (0, 0xFF) else granularity
    page = controller.page_bytes
    with controller.memory(pages * _PAGE) as memory, controller.memory(page) as table:
        entries = pages_of([Segment(memory, 0, pages * _PAGE)], page) or []
        first, second = prp(entries, table, page)
        for at in range(0, len(image), pages * _PAGE):
            part = image[at : at + pages * _PAGE]
            memory.view[: len(part)] = part
            command = nvme_spec.command(
                nvme_spec.FIRMWARE_DOWNLOAD,
                prp1=first,
                prp2=second,
                dwords=(len(part) // 4 - 1, (offset + at) // 4),
            )
            controller.admin(command, SLOW_S, what="firmware download", holds=(memory, table))


def firmware_commit(controller: Controller, slot: int, action: int) -> int:
    """Commit the image that was handed over (5.12): `action` 0 stores it in `slot`, 1 activates it
    at the next reset as well, 2 activates what the slot holds, 3 at once. Returns dword 0."""
    _refuse_wide(slot=(slot, 3), action=(action, 3))
    command = nvme_spec.command(nvme_spec.FIRMWARE_COMMIT, dwords=(slot | action << 3,))
    return controller.admin(command, SLOW_S, what="firmware commit").result


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """What an Asynchronous Event Request ended with (5.2.1): type (0 error, 1 health, 2 notice),
    information, and the log page whose reading clears it."""

    kind: int
    information: int
    page: int


class Events:
    """Asynchronous events of a controller (5.2): requests stay out until something happens.

    with Events(controller) as events: ... events.wait(10.0)
    """

    def __init__(self, controller: Controller, mask: int = 0xFFFFFFFF, count: int = 1) -> None:
        self.controller = controller
        raw = controller.identity.raw
        offered = struct.unpack_from("<I", raw, 92)[0] | 0xFF if len(raw) >= 96 else 0xFF
        self._mask = mask & offered
        self._found: list[AsyncEvent] = []
        self._open = True
        # Requests to send: all at first, and again those that a reset of the controller took.
        self._missing = max(1, min(count, controller.identity.events_limit))
        self._forgotten = True
        self._ask()

    def _ask(self) -> None:
        if self._forgotten:
            set_feature(self.controller, Feature.ASYNC_EVENTS, self._mask)
            self._forgotten = False
        while self._missing:
            self._missing -= 1
            self.controller.request_event(self._told)

    def _told(self, status: int, result: int) -> None:
        if status == ABORTED_BY_HOST:
            self._missing += 1
            self._forgotten = True
        elif not status and self._open:
            self._found.append(AsyncEvent(result & 7, result >> 8 & 0xFF, result >> 16 & 0xFF))

    def wait(self, timeout_s: float = 0.0) -> list[AsyncEvent]:
        """The events that came, waiting up to `timeout_s` for the first. The log page of each is
        read, so that the next of its kind is told as well. After a reset of the controller events
        are asked for again, here."""
        end = time.monotonic() + timeout_s
        self.controller.look()
        self._ask()
        while not self._found and time.monotonic() < end:
            time.sleep(min(0.01, max(0.0, end - time.monotonic())))
            self.controller.look()
        taken, self._found = self._found, []
        try:
            for event in taken:
                log_page(self.controller, event.page, 512)
        except BaseException:
            self._found = taken + self._found
            raise
        self._missing += len(taken)
        self._ask()
        return taken

    def close(self) -> None:
        """Report nothing further; the requests stay with the controller until its end."""
        self._open = False

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
