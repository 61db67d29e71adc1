"""Devices in Python that tests/virtio/test_python_in_guests.py serves to guests."""

from __future__ import annotations

import os

from vfiotool.virtio.console import Console
from vfiotool.virtio.storage import Storage

FILE = "VFIOTOOL_TEST_IMAGE"


class FileStorage(Storage):
    """A disk whose bytes are a file's, which stays when this process is killed."""

    def __init__(self) -> None:
        path = os.environ[FILE]
        super().__init__(os.stat(path).st_size, serial="python-disk")
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def read(self, offset: int, into: memoryview) -> None:
        if os.preadv(self.fd, [into], offset) != len(into):
            raise OSError("short")

    def write(self, offset: int, data: memoryview) -> None:
        if os.pwritev(self.fd, [data], offset) != len(data):
            raise OSError("short")

    def flush(self) -> None:
        os.fdatasync(self.fd)


class Shouting(Console):
    """A console that answers in capitals."""

    def received(self, data: bytes) -> None:
        self.send(data.upper())
