"""A VFIO library: open a device, reach its registers, give it memory, take its interrupts.

    from vfiotool.vfio import Device

    with Device.open("0000:00:02.0") as device:
        bar = device.region(0).map()
        print(hex(bar.read32(0)))

The names that drivers use are here; each module's docstring tells the rest.
"""

from vfiotool.vfio.backend import AddressSpace, open_space
from vfiotool.vfio.device import Device
from vfiotool.vfio.dma import Dma, DmaBuffer
from vfiotool.vfio.irq import Interrupt, Interrupts, InterruptSet
from vfiotool.vfio.region import Mapping, Region, Registers
from vfiotool.vfio.target import Target, find
from vfiotool.vfio.trace import Trace

__all__ = [
    "AddressSpace",
    "Device",
    "Dma",
    "DmaBuffer",
    "Interrupt",
    "InterruptSet",
    "Interrupts",
    "Mapping",
    "Region",
    "Registers",
    "Target",
    "Trace",
    "find",
    "open_space",
]
