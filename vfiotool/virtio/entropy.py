"""The entropy device (Virtual I/O Device 1.2, section 5.4): random bytes from this host."""

from __future__ import annotations

import os

from vfiotool.native.direct import QueueRequest
from vfiotool.virtio.device import VirtioDevice


class EntropySource(VirtioDevice):
    """Fills each buffer, up to 64 KiB of it, from the kernel's generator."""

    id = 4

    def handle(self, queue: int, requests: list[QueueRequest]) -> None:
        for request in requests:
            request.complete(request.write(os.urandom(min(request.room, 1 << 16))))
