"""An address space without a kernel: what is mapped stands in a dictionary, and calls can be made
to fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import NoReturn

from vfiotool.errors import KernelError, UsageError
from vfiotool.host.host import Host
from vfiotool.native import library as native
from vfiotool.vfio.space import AddressSpace, Attachment, StillMapped, let_go
from vfiotool.vfio.target import Target


class FakeSpace(AddressSpace):
    """`refuse_unmap` holds I/O addresses whose mapping the IOMMU keeps; `fail_at` the one at which
    mapping fails."""

    name = "fake"

    def __init__(self) -> None:
        super().__init__(Host.local())
        self.file = native.Handle(os.open("/dev/null", os.O_RDWR))
        self._aim(self.file, None)
        self.mapped: dict[int, tuple[int, int]] = {}
        self.refuse_unmap: set[int] = set()
        self.fail_at: int | None = None
        self.interrupt_after_map: BaseException | None = None
        self.guard = threading.Lock()

    def map(self, address: int, iova: int, size: int, /, *, read: bool, write: bool) -> None:
        self.refuse_closed()
        with self.guard:
            if any(
                at < iova + size and iova < at + length for at, (_, length) in self.mapped.items()
            ):
                raise UsageError("something is mapped there")
            if self.fail_at is not None and len(self.mapped) >= self.fail_at:
                raise KernelError("map: ENOMEM", errno_name="ENOMEM")
            self.mapped[iova] = (address, size)
        if self.interrupt_after_map is not None:
            raise self.interrupt_after_map

    def map_many(self, rows: Iterable[tuple[int, int, int]], /, *, read: bool, write: bool) -> None:  # type: ignore[override]
        done = []
        for address, iova, size in rows:
            try:
                self.map(address, iova, size, read=read, write=write)
            except KernelError as error:
                for at in done:
                    if at in self.refuse_unmap:
                        raise StillMapped("and could not be taken back") from error
                    del self.mapped[at]
                raise
            done.append(iova)

    def unmap(self, iova: int, size: int, /) -> int:
        self.refuse_closed()
        with self.guard:
            if iova in self.refuse_unmap:
                raise KernelError("unmap: EIO", errno_name="EIO")
            return self.mapped.pop(iova, (0, 0))[1]

    def _attach(self, target: Target, vf_token: str | None) -> Attachment:
        return Attachment(target, native.Handle(os.open("/dev/null", os.O_RDWR)), None)

    def _detach(self, attachment: Attachment) -> None:
        let_go(attachment.handle)

    def _map_failed(self, result: int, address: int, iova: int, size: int) -> NoReturn:
        raise native.failed(result, "map")

    def _cuts(self, result: int, iova: int, size: int) -> bool:
        return False

    def unmap_all(self) -> int:
        return sum(self.unmap(iova, 0) for iova in list(self.mapped))

    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, (1 << 40) - 1),)

    def page_sizes(self) -> int:
        return 4096

    def dirty_track(self, start: bool) -> None:
        raise NotImplementedError

    def dirty_bitmap(self, iova: int, size: int, page_size: int = 4096) -> bytes:
        raise NotImplementedError

    def _handles(self) -> list[native.Handle]:
        return [self.file]
