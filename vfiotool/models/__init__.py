"""PCI devices in Python, served over vfio-user to QEMU and to `Device.open("vfio-user:PATH")`.

    class Counter(Model):
        vendor, device, class_code = 0x1234, 0x0001, 0xFF0000
        bars = (BarSpec(0, 4096, registers=CounterRegisters),)

        @writes(CounterRegisters.step)
        def step(self, value: int) -> None: ...

    with ModelServer(Counter(), "/run/counter.sock"): ...

docs/model-guide.md writes a model and its driver. Models that are there: `edu`, `pci_testdev`,
`nvme`, and `replay`, which plays a configuration space.
"""

from vfiotool.models.bar import BarSpec, reads, writes
from vfiotool.models.config import EXPRESS, ModelConfig
from vfiotool.models.device import Model
from vfiotool.models.dma import DmaFault
from vfiotool.models.faults import FAULT_NAMES, Faults
from vfiotool.models.nvme import NvmeModel
from vfiotool.models.replay import ReplayModel, Resource, bars_of, parse_resources
from vfiotool.models.server import ModelServer

__all__ = [
    "EXPRESS",
    "FAULT_NAMES",
    "BarSpec",
    "DmaFault",
    "Faults",
    "Model",
    "ModelConfig",
    "ModelServer",
    "NvmeModel",
    "ReplayModel",
    "Resource",
    "bars_of",
    "parse_resources",
    "reads",
    "writes",
]
