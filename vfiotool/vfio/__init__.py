"""A VFIO library: open a device, reach its registers, give it memory, take its interrupts.

    from vfiotool.vfio import Device

    with Device.open("0000:00:02.0") as device:
        bar = device.region(0).map()
        print(hex(bar.read32(0)))

The names that drivers use are here: nothing else need be imported.
"""

from vfiotool.vfio.backend import BACKENDS, Backend, backend_named, open_space
from vfiotool.vfio.caps import Area, DeviceInfo, IrqInfo, RegionInfo
from vfiotool.vfio.device import FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Dependent, Device
from vfiotool.vfio.dma import Dma, DmaBuffer, dma_of
from vfiotool.vfio.gfx import (
    Plane,
    PlaneKind,
    open_dmabuf,
    plane_kind,
    primary_plane,
    read_plane,
)
from vfiotool.vfio.irq import IRQ_NAMES, Interrupt, Interrupts, InterruptSet
from vfiotool.vfio.migration import STATE_NAMES, DirtyLog, Migration, SaveReport, probe
from vfiotool.vfio.region import Config, Mapping, Region, Registers
from vfiotool.vfio.registers import BoundRegister, Register, RegisterMap
from vfiotool.vfio.space import AddressSpace, StillMapped
from vfiotool.vfio.target import Target, find
from vfiotool.vfio.trace import Trace, differences, load

__all__ = [
    "BACKENDS",
    "FEATURE_GET",
    "FEATURE_PROBE",
    "FEATURE_SET",
    "IRQ_NAMES",
    "STATE_NAMES",
    "AddressSpace",
    "Area",
    "Backend",
    "BoundRegister",
    "Config",
    "Dependent",
    "Device",
    "DeviceInfo",
    "DirtyLog",
    "Dma",
    "DmaBuffer",
    "Interrupt",
    "InterruptSet",
    "Interrupts",
    "IrqInfo",
    "Mapping",
    "Migration",
    "Plane",
    "PlaneKind",
    "Region",
    "RegionInfo",
    "Register",
    "RegisterMap",
    "Registers",
    "SaveReport",
    "StillMapped",
    "Target",
    "Trace",
    "backend_named",
    "differences",
    "dma_of",
    "find",
    "load",
    "open_dmabuf",
    "open_space",
    "plane_kind",
    "primary_plane",
    "probe",
    "read_plane",
]
