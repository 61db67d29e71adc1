"""The Controller Memory Buffer (CMB): memory of a controller's own, in which queues can lie.

A controller fetches commands from a submission queue there without a read over the bus. It knows
its buffer by addresses that the driver gives it (NVMe 1.4); these are taken from the I/O addresses
that DMA buffers get theirs from, so that no address means both.

Source: NVM Express Base Specification 2.0, 3.1.3.11 (CMBLOC), 3.1.3.12 (CMBSZ), 3.1.3.16 (CMBMSC),
3.1.3.17 (CMBSTS), 8.5.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.vfio import Device, Mapping, RegionInfo

_PAGE = 4096
# CMBMSC: its registers are enabled (CRE), its addresses are decoded (CMSE).
_REGISTERS, _DECODE = 1 << 0, 1 << 1
# The highest addresses of these bits are tried for it, lowest come first what controllers reach.
_ADDRESS_BITS = (48, 32)
_UNITS = 7  # CMBSZ.SZU: 0 is 4 KiB, each further one 16 times as much, up to 64 GiB
_REGIONS = (0, 2, 3, 4, 5)  # what CMBLOC.BIR may name
_MSIX = 0x11
# What of Identify Controller never changes: vendor, serial number, model, firmware.
_STEADY = 72
_OWN_ADDRESS = (
    "the controller knows it by the address of its BAR on the bus (NVMe 1.2 and 1.3); VFIO shows "
    "an emulated BAR, and in a virtual machine the address is another"
)


@dataclass(frozen=True, slots=True)
class MemoryBuffer:
    """A Controller Memory Buffer: `size_bytes` of region `region` from `offset` on, as far as they
    lie within the region; what may lie in it: queues, lists of data pointers, data that is read
    from the disk and written to it. `problem` is why nothing can be placed in it, or None."""

    size_bytes: int
    region: int
    offset: int
    submission_queues: bool
    completion_queues: bool
    lists: bool
    read_data: bool
    write_data: bool
    problem: str | None = None

    @property
    def holds(self) -> list[str]:
        """What may lie in it, in words."""
        told = {
            "submission-queues": self.submission_queues,
            "completion-queues": self.completion_queues,
            "lists": self.lists,
            "read-data": self.read_data,
            "write-data": self.write_data,
        }
        return [name for name, is_so in told.items() if is_so]

    @classmethod
    def parse(
        cls,
        location: int,
        size: int,
        regions: Sequence[RegionInfo | None],
        taken: Iterable[tuple[int, int, int]],
    ) -> MemoryBuffer | None:
        """From CMBLOC and CMBSZ; None where CMBSZ tells no size. `taken` are (region, first byte,
        end) of what lies elsewhere in the BARs. Whatever a controller tells gives an answer: what
        cannot be is a `problem`."""
        unit = 1 << 12 + 4 * (size >> 8 & 0xF)
        length, offset, number = (size >> 12) * unit, (location >> 12) * unit, location & 7
        if not length:
            return None
        region = regions[number] if number in _REGIONS and number < len(regions) else None
        # Behind a bridge a BAR can be smaller than what the controller has: 3.1.3.12.
        within = max(0, (region.size if region else 0) - offset)
        known = size >> 8 & 0xF < _UNITS
        length = min(length, within // _PAGE * _PAGE) if known else 0
        end, problem = offset + length, None
        if not known:
            problem = f"its size is told in a unit that there is not (CMBSZ is {size:#x})"
        elif region is None or not region.size:
            problem = f"it lies in BAR {number}, which there is not"
        elif not length:
            problem = f"it begins at {offset:#x} of BAR {number}, which has {region.size} bytes"
        elif any(one == number and first < end and offset < last for one, first, last in taken):
            problem = f"it lies over other registers of BAR {number}"
        elif not any(a.offset <= offset and end <= a.offset + a.size for a in region.areas):
            problem = f"this part of BAR {number} cannot be mapped"
        sqs, cqs, lists, rds, wds = (bool(size >> bit & 1) for bit in range(5))
        return cls(length, number, offset, sqs, cqs, lists, rds, wds, problem)


class MemoryPiece:
    """A part of the buffer: `size` bytes at `iova` for the controller, at `address` for C in this
    process, which stores there in whole words while it is inside the gate of `window`."""

    def __init__(self, owner: ControllerMemory, window: Mapping, iova: int, offset: int, size: int):
        self.owner, self.window = owner, window
        self.iova, self.size = iova, size
        self.address = window.address(offset, size)
        self.closed = False
        self.pins = 0

    def pin(self) -> None:
        """As `DmaBuffer.pin`."""
        if self.closed:
            raise UsageError(f"the piece of the memory buffer at {self.iova:#x} is closed")
        self.pins += 1

    def unpin(self) -> None:
        """The counterpart of one `pin`."""
        self.pins -= 1

    def close(self) -> None:
        """Give it back. Raises UsageError while it is pinned. Closing twice is nothing."""
        if self.pins:
            raise UsageError(f"the piece of the memory buffer at {self.iova:#x} is in use")
        if not self.closed:
            self.closed = True
            self.owner.take_back(self)

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<MemoryPiece of {self.size} bytes at {self.iova:#x}{state}>"


class ControllerMemory:
    """The buffer of a controller that is being driven: its registers, addresses and pieces.

    Until the first `place` the controller decodes none of its addresses: every I/O address is the
    host's memory. From then on it does, also after a reset, until `close`.
    """

    def __init__(
        self,
        device: Device,
        registers: nvme_spec.NvmeRegisters,
        page_bytes: int,
        admin: Callable[[bytes], object],
    ) -> None:
        self.device = device
        self.registers = registers
        self.page_bytes = page_bytes
        self.found: MemoryBuffer | None = None
        self._admin = admin
        self._identity = b""
        self._enabled = False  # CMBMSC is there to be written
        self._own_address = False
        self._base: int | None = None
        self._decoding = False
        self._window: Mapping | None = None
        self._used: dict[int, int] = {}  # pieces: offset in the buffer and size
        self._lock = threading.RLock()

    def restore(self) -> None:
        """Before the controller is enabled: have it decode what it did before its reset, and
        nothing when it is new to us, whatever a driver before has left. Raises KernelError where
        it does not take the addresses back."""
        registers = self.registers
        if not registers.capabilities.field("memory_buffer"):
            version = registers.version.fields()
            self._own_address = (1, 2) <= (version["major"], version["minor"]) < (1, 4)
            return
        if not self._enabled and not registers.memory_control.read() & _REGISTERS:
            # Of 1.4 they read zero until they are enabled. QEMU's legacy-cmb does not.
            self._own_address = bool(registers.memory_size.read())
        self._enabled = not self._own_address
        if self._enabled and not self._decode(self._base):
            raise KernelError(f"{self.device.name} does not take its memory buffer's address again")

    def _decode(self, base: int | None) -> bool:
        """Whether it takes `base` as its buffer's address; none is decoded otherwise."""
        registers = self.registers
        registers.memory_control.write(_REGISTERS)
        self._decoding = base is not None
        # The half that turns it on last, as the kernel's hi_lo_writeq: QEMU heeds that one only.
        registers.memory_control_high.write((base or 0) >> 32)
        if base is None:
            return True
        registers.memory_control.write(base & 0xFFFFF000 | _DECODE | _REGISTERS)
        if not registers.memory_status.field("invalid_address"):
            return True
        registers.memory_control.write(_REGISTERS)
        self._decoding = False
        return False

    def learn(self, doorbells_end: int, identity: bytes) -> None:
        """Read what it is; the registers of region 0 end at `doorbells_end`, and `identity` is what
        Identify Controller tells."""
        self._identity = identity[:_STEADY]
        if not self._enabled and not self._own_address:
            return
        size = self.registers.memory_size.read()
        if not size:
            return
        taken = [(0, 0, doorbells_end), *_msix(self.device)]
        location = self.registers.memory_location.read()
        found = MemoryBuffer.parse(location, size, self.device.regions, taken)
        if found is not None and self._own_address and found.problem is None:
            found = replace(found, problem=_OWN_ADDRESS)
        self.found = found

    def place(self, size: int) -> MemoryPiece:
        """Room for a submission queue of `size` bytes. Raises Unsupported where the controller has
        no buffer that can hold one, KernelError (ENOSPC) where it is full."""
        found, name = self.found, self.device.name
        if found is None:
            raise Unsupported(f"{name} has no controller memory buffer", device=name)
        if found.problem is not None:
            raise Unsupported(f"{name}: its memory buffer cannot be used: {found.problem}")
        if not found.submission_queues:
            raise Unsupported(
                f"{name}: its memory buffer does not take submission queues",
                hint=f"it takes {', '.join(found.holds) or 'nothing'}",
            )
        with self._lock:
            window, base = self._open(found)
            at = self._gap(size)
            if at + size > found.size_bytes:
                raise KernelError(
                    f"no room for {size} bytes in the memory buffer of {name}, which has "
                    f"{found.size_bytes}",
                    hint="close a queue that lies in it, or create this one without it",
                    errno_name="ENOSPC",
                )
            piece = MemoryPiece(self, window, base + at, found.offset + at, size)
            self._used[at] = size
            return piece

    def take_back(self, piece: MemoryPiece) -> None:
        """What `MemoryPiece.close` calls."""
        with self._lock:
            if self._base is not None:
                self._used.pop(piece.iova - self._base, None)

    def _gap(self, size: int) -> int:
        """Where the first gap of `size` bytes begins; the last one has no end."""
        at = 0
        for start, length in sorted(self._used.items()):
            if at + size <= start:
                break
            at = -(-(start + length) // self.page_bytes) * self.page_bytes
        return at

    def _open(self, found: MemoryBuffer) -> tuple[Mapping, int]:
        if self._window is None:
            self._window = self.device.region(found.region).map(found.offset, found.size_bytes)
        if self._base is None:
            self._base = self._set_base(found, self._window)
        return self._window, self._base

    def _set_base(self, found: MemoryBuffer, window: Mapping) -> int:
        """Addresses that are set aside and that the controller takes."""
        dma, problem = self.device.dma, ""
        for bits in _ADDRESS_BITS:
            try:
                base = dma.set_aside(found.size_bytes, align=self.page_bytes, limit_bits=bits)
            except KernelError:
                continue  # none is left of so many bits
            problem = "it takes none of the addresses that are free for it (CMBSTS.CBAI)"
            if self._decode(base):
                if self._answers(found, window, base):
                    return base
                self._decode(None)
                problem = "it is not at the address that the controller took for it"
            dma.give_back(base)
        problem = problem or "no I/O addresses are left for it"
        self.found = replace(found, problem=problem)
        raise Unsupported(f"{self.device.name}: its memory buffer cannot be used: {problem}")

    def _answers(self, found: MemoryBuffer, window: Mapping, base: int) -> bool:
        """Whether what the controller stores at `base` is seen in the window, where it may store
        data there: QEMU's legacy-cmb takes any address and decodes its own. Nothing else is mapped
        at `base`: what goes astray is stopped by the IOMMU. Raises KernelError where no answer
        comes; one may come later, so `base` stays set aside."""
        if not found.read_data:
            return True
        window.write_from(found.offset, bytes(_STEADY), width=8)
        identify = nvme_spec.command(
            nvme_spec.IDENTIFY, prp1=base, dwords=(nvme_spec.CNS_CONTROLLER,)
        )
        try:
            self._admin(identify)
        except KernelError as error:
            if error.errno_name is not None:
                raise
        seen = window.read_many(found.offset, _STEADY // 8, width=8).tobytes()
        return seen == self._identity

    def close(self, stopped: bool) -> None:
        """Once no queue lies in it: decode nothing any more, give the addresses back. Where the
        controller could not be stopped, or its registers not be reached, they stay set aside: it
        may still take them for its buffer."""
        window, self._window = self._window, None
        if window is not None:
            # One that somebody else keeps an address of is closed with the device.
            with contextlib.suppress(UsageError):
                window.close()
        base, self._base = self._base, None
        self._used.clear()
        if self._decoding and stopped:
            with contextlib.suppress(VfiotoolError):
                self._decode(None)
                if base is not None:
                    self.device.dma.give_back(base)


def _msix(device: Device) -> list[tuple[int, int, int]]:
    """Where the MSI-X table and its pending bits lie (PCI Local Bus Specification 3.0, 6.8.2)."""
    at = device.reach.capability(_MSIX)
    if at is None:
        return []
    config = device.config
    vectors = (config.read16(at + 2) & 0x7FF) + 1
    places = []
    for offset, length in ((4, 16 * vectors), (8, -(-vectors // 64) * 8)):
        word = config.read32(at + offset)
        places.append((word & 7, word & ~7, (word & ~7) + length))
    return places
