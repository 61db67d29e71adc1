"""A device's state, saved and restored through VFIO migration, version 2.

Saving runs the device through PRE_COPY (where it goes on working), STOP_COPY and STOP; restoring
through RESUMING, STOP and RUNNING. Source: <linux/vfio.h>, "enum vfio_device_mig_state" and what
stands around it. The stream is the device's own and opaque.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vfiotool.errors import KernelError, Unsupported, UsageError, VfiotoolError
from vfiotool.native import library as native
from vfiotool.native.library import ffi, lib
from vfiotool.vfio.device import FEATURE_GET, FEATURE_SET, Device

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
STATE_NAMES = (
    "error",
    "stop",
    "running",
    "stop-copy",
    "resuming",
    "running-p2p",
    "pre-copy",
    "pre-copy-p2p",
)
_FEATURE_MIGRATION = 1
_FEATURE_STATE = 2
_FEATURE_SIZE = 9
_FEATURE_LOG_START, _FEATURE_LOG_STOP, _FEATURE_LOG_REPORT = 6, 7, 8
_FLAG_STOP_COPY, _FLAG_P2P, _FLAG_PRE_COPY = 1, 2, 4
_STATE = struct.Struct("=Ii")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Support:
    """What a device offers: `pre_copy` lets it run while most of its state is read, `p2p` quiets
    it among peers first, `dirty_log` records what it writes to memory. `size_bytes` estimates the
    stream of STOP_COPY, None where the kernel cannot."""

    stop_copy: bool
    pre_copy: bool
    p2p: bool
    dirty_log: bool
    size_bytes: int | None


def probe(device: Device) -> Support | None:
    """What `device` offers for migration; None where its driver or kernel offers nothing."""
    try:
        (flags,) = struct.unpack("=Q", device.feature(_FEATURE_MIGRATION, FEATURE_GET, bytes(8)))
    except VfiotoolError:
        return None
    if not flags & _FLAG_STOP_COPY:
        return None
    size: int | None = None
    try:
        (size,) = struct.unpack("=Q", device.feature(_FEATURE_SIZE, FEATURE_GET, bytes(8)))
    except VfiotoolError:
        size = None
    return Support(
        stop_copy=True,
        pre_copy=bool(flags & _FLAG_PRE_COPY),
        p2p=bool(flags & _FLAG_P2P),
        dirty_log=device.features()["dma-logging-start"],
        size_bytes=size,
    )


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save came to: bytes read while the device ran, bytes read after, and how long the
    device was stopped."""

    running_bytes: int
    stopped_bytes: int
    stopped_s: float


class Migration:
    """The migration of an open device. Raises Unsupported where it has none."""

    def __init__(self, device: Device) -> None:
        found = probe(device)
        if found is None:
            raise Unsupported(
                f"{device.name} cannot migrate: its VFIO driver offers no saving of its state",
                hint=f"a variant driver for it may: vfiotool bind {device.name} --driver NAME",
                device=device.name,
            )
        self.device = device
        self.support = found

    def __repr__(self) -> str:
        return f"<Migration of {self.device!r}>"

    @property
    def state(self) -> int:
        """The device's state, one of the numbers above."""
        raw = self.device.feature(_FEATURE_STATE, FEATURE_GET, _STATE.pack(0, -1))
        return int(_STATE.unpack(raw)[0])

    def move(self, state: int) -> int | None:
        """Bring the device into `state`; the descriptor of the data session if that began one.

        Raises KernelError naming the state that the device was left in.
        """
        try:
            raw = self.device.feature(_FEATURE_STATE, FEATURE_SET, _STATE.pack(state, -1))
        except KernelError as error:
            left = STATE_NAMES[self.state]
            raise KernelError(
                f"{error.message}: from there to {STATE_NAMES[state]}; it is in {left} now",
                hint="vfiotool device reset" if left == "error" else None,
                device=self.device.name,
                errno_name=error.errno_name,
            ) from error
        descriptor = int(_STATE.unpack(raw)[1])
        return descriptor if descriptor >= 0 else None

    def save(
        self,
        sink: Callable[[bytes], object],
        *,
        pre_copy: bool = True,
        keep_running: bool = False,
        rounds: int = 8,
    ) -> SaveReport:
        """Hand the device's state to `sink` piece by piece. The device ends in STOP, or running
        again with `keep_running`; if anything fails it runs again where that is possible.

        With `pre_copy`, and where the device has it, what can be read while it runs is read then,
        in at most `rounds` rounds.
        """
        data: int | None = None
        try:
            running_bytes = 0
            if pre_copy and self.support.pre_copy:
                data = self.move(PRE_COPY)
                running_bytes = self._read_running(data, sink, rounds)
            began = time.monotonic()
            fresh = self.move(STOP_COPY)
            data = data if fresh is None else fresh
            stopped_bytes = sum(self._read(data, sink))
            self.move(STOP)
            stopped = time.monotonic() - began
            if keep_running:
                self.move(RUNNING)
        except BaseException:
            self._try(RUNNING)
            raise
        finally:
            if data is not None:
                native.close(data)
        return SaveReport(running_bytes, stopped_bytes, stopped)

    def _read_running(self, data: int | None, sink: Callable[[bytes], object], rounds: int) -> int:
        total = 0
        for _ in range(rounds):
            total += sum(self._read(data, sink))
            left = self.precopy_left(data)
            if not sum(left):
                break
        return total

    def precopy_left(self, data: int | None) -> tuple[int, int]:
        """The kernel's estimate of what is left in PRE_COPY: (initial bytes, dirty bytes)."""
        initial, dirty = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        result = lib.vt_precopy_info(self._session(data), initial, dirty)
        native.check(result, f"VFIO_MIG_GET_PRECOPY_INFO of {self.device.name}")
        return int(initial[0]), int(dirty[0])

    def _session(self, data: int | None) -> int:
        if data is None:
            raise KernelError(f"{self.device.name} began no session to move its state")
        return data

    def _read(self, data: int | None, sink: Callable[[bytes], object]) -> Iterator[int]:
        """Yields the sizes of the pieces, until the end, or until there is no more for now."""
        session = self._session(data)
        buffer = ffi.new("char[]", _CHUNK)
        while True:
            count = int(lib.vt_data_read(session, buffer, _CHUNK))
            if count == -errno.EINTR:
                continue
            if count in (0, -errno.ENOMSG):
                return
            if count < 0:
                raise native.failed(count, f"read the state of {self.device.name}")
            sink(bytes(ffi.buffer(buffer, count)))
            yield count

    def restore(self, pieces: Iterator[bytes], *, start: bool = True) -> int:
        """Give the device a state that was saved from a device of its kind; returns the bytes
        given. It then runs, or stays in STOP without `start`. If the device refuses the state it
        is reset where that is possible, and the error tells."""
        total = 0
        data: int | None = None
        try:
            data = self.move(RESUMING)
            for piece in pieces:
                self._write(self._session(data), piece)
                total += len(piece)
            self.move(STOP)
            if start:
                self.move(RUNNING)
        except BaseException:
            self._recover()
            raise
        finally:
            if data is not None:
                native.close(data)
        return total

    def _write(self, session: int, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            part = piece[at : at + _CHUNK]
            count = int(lib.vt_data_write(session, part, len(part)))
            if count == -errno.EINTR:
                continue
            if count <= 0:
                raise native.failed(
                    count or -errno.EIO,
                    f"{self.device.name} does not take the state",
                    hint="it must come from a device of the same kind and driver version",
                )
            at += count

    def _recover(self) -> None:
        """Out of RESUMING and ERROR only a reset leads. It is tried where the device does not
        tell of one, too: mtty has one that it keeps from its flags."""
        with contextlib.suppress(VfiotoolError):
            if self.device.info.has_reset:
                self.device.reset()
            else:
                with self.device.reach.resetting(), self.device.use() as fd:
                    native.device_reset(fd, self.device.name)
        self._try(RUNNING)

    def _try(self, state: int) -> None:
        with contextlib.suppress(VfiotoolError):
            self.move(state)


class DirtyLog:
    """What a device records by itself of its writes to memory, in I/O addresses. It begins when it
    is made and ends with `close`; `AddressSpace.dirty_track` is the IOMMU's counterpart.

    `ranges` are the (iova, size) to be watched, in pages of `page_size` bytes; the device may take
    a coarser one. Raises Unsupported where it records nothing.
    Source: VFIO_DEVICE_FEATURE_DMA_LOGGING_* in <linux/vfio.h>.
    """

    def __init__(
        self, device: Device, ranges: Sequence[tuple[int, int]], page_size: int = 4096
    ) -> None:
        self.device = device
        self.closed = False
        self.page_size = page_size
        pairs = ffi.new("uint64_t[]", [number for pair in ranges for number in pair])
        where = int(ffi.cast("uintptr_t", pairs))
        request = struct.pack("=QIIQ", page_size, len(ranges), 0, where)
        answer = device.feature(_FEATURE_LOG_START, FEATURE_SET, request)
        self.device_page_size: int = struct.unpack_from("=Q", answer)[0]
        device.on_close(self.close)

    def __repr__(self) -> str:
        return f"<DirtyLog of {self.device.name}, {'closed' if self.closed else 'recording'}>"

    def report(self, iova: int, size: int) -> bytes:
        """Which pages of a watched range were written since the last report of it: one bit a page,
        least significant first, in whole 64-bit words."""
        if self.closed:
            raise UsageError(f"the dirty log of {self.device.name} is closed")
        bitmap = bytearray(native.bitmap_bytes(size, self.page_size))
        where = native.address_of(bitmap)
        request = struct.pack("=QQQQ", iova, size, self.page_size, where)
        self.device.feature(_FEATURE_LOG_REPORT, FEATURE_GET, request)
        return bytes(bitmap)

    def close(self) -> None:
        """Stop recording. Closing twice is nothing."""
        if not self.closed:
            self.closed = True
            self.device.feature(_FEATURE_LOG_STOP, FEATURE_SET)

    def __enter__(self) -> DirtyLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
