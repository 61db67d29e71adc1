"""The NVMe model behind a socket, as the tests of the driver hold it: device and model in one.

Reading an attribute asks this, then the model, then the opened device; setting one that the model
has sets it there. So a test turns the model's knobs and hands the same object to `Controller`.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from vfiotool.models import ModelServer
from vfiotool.models.nvme import NvmeModel, NvmeModelRegisters
from vfiotool.vfio import Device, DmaBuffer

# What the tests call it, and what the model does.
_KNOBS = {"mute": "mute_queues", "mad": "wrong_ids"}


class ServedNvme:
    """Use as a context manager."""

    def __init__(self, blocks: int = 4096, shift: int = 9) -> None:
        self.model = NvmeModel(blocks, shift)
        self.model.serial, self.model.model_name = b"fake-1", b"Fake \x1b[31m"
        self.open: Device
        self.__dict__["_made"] = True

    def __enter__(self) -> ServedNvme:
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        server = self.stack.enter_context(ModelServer(self.model, f"{folder}/s"))
        self.open = self.stack.enter_context(Device.open(server.name))
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def __getattr__(self, name: str) -> Any:
        name = _KNOBS.get(name, name)
        if name == "gone":
            return self.model.faults.gone
        own = self.__dict__
        if name in ("model", "open", "stack"):
            raise AttributeError(name)
        if name not in ("device", "vendor", "class_code", "reset", "memory") and hasattr(
            own["model"], name
        ):
            return getattr(own["model"], name)
        return getattr(own["open"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gone":
            self.model.faults.gone = value
        elif self.__dict__.get("_made") and hasattr(self.model, _KNOBS.get(name, name)):
            setattr(self.model, _KNOBS.get(name, name), value)
        else:
            self.__dict__[name] = value

    def alloc(self, size: int, **options: Any) -> DmaBuffer:
        return self.open.dma.alloc(size, **options)

    @property
    def buffers(self) -> dict[int, DmaBuffer]:
        return self.open.dma.buffers

    @property
    def registers(self) -> dict[int, int]:
        return {one.offset: self.model.get(one) for one in NvmeModelRegisters.registers()}

    def at(self, iova: int, length: int) -> memoryview:
        for buffer in self.buffers.values():
            if buffer.iova <= iova and iova + length <= buffer.iova + buffer.size:
                return buffer.view[iova - buffer.iova :][:length]
        raise KeyError(f"no DMA mapping at {iova:#x}")

    def reset(self) -> None:
        """Somebody else's reset: CC.EN is 0 afterwards."""
        with self.model.lock:
            self.model.bar(0).store(0x14, 0, 4)
            self.model._forget()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; fails after ten seconds."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            threading.Event().wait(1e-3)
