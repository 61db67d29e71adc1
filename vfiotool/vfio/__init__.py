"""A VFIO library: open a device, reach its registers, give it memory, take its interrupts.

    from vfiotool.vfio import Device

    with Device.open("0000:00:02.0") as device:
        bar = device.region("bar0").map()
        print(hex(bar.read32(0)))

The device has to be on a VFIO driver: `vfiotool bind 0000:00:02.0`. All names that drivers use are
here; docs/driver-guide.md writes a driver step by step.

Opening
    `Device.open(name)` takes a PCI address or a mediated device's UUID, over iommufd or a container
    (`backend=`), and is a context manager: at its end the device is quiet, whatever happened.
    `find` and `open_space` open several devices in one address space. `vfio-user:PATH` opens a
    device that a process serves on that socket: no root, no kernel module (docs/model-guide.md).

Registers
    `device.region(n)`, also by name: "bar0" to "bar5", "rom", "config". A `Region` reads and writes
    through the kernel, `region.map()` gives a `Mapping`, whose accesses are one load or store each.
    Offsets are bytes, values unsigned, byte order is little-endian. `RegisterMap` and `Register`
    declare what a device has, with names and fields. `poll` waits for a value in C.

Memory
    `device.dma.alloc(size)` and `device.dma.map(memory)` give a `DmaBuffer`: `iova` is what the
    device sees, `view` what this process sees. `set_bus_master(True)` lets the device use it.

Interrupts
    `device.irqs.msix(n)`, `msi(n)`, `intx()`, `error()`, `request()` give interrupts: `wait`,
    `await wait_async()`, `async for`; each waiter is woken, and closing ends every wait.

Times, threads, processes, errors
    Time-outs are seconds; None and inf are no limit, less than 0 is now. Any thread may use any
    object, and close it while others use it. A child process may use none of its parent's. All
    errors are `vfiotool.errors.VfiotoolError` and kin of Python's own: OSError with its errno,
    TimeoutError, PermissionError, ValueError. A device that cannot be reached (memory decode off,
    asleep, being reset, gone) refuses mapped accesses with an error: `device.unreachable` is why.

More
    `Trace` records accesses, `Migration` and `DirtyLog` save a device's state, `primary_plane` and
    `read_plane` look at a display.
"""

from vfiotool.vfio import user_message
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
from vfiotool.vfio.opened import refuse_child
from vfiotool.vfio.region import Config, Mapping, Region, Registers
from vfiotool.vfio.registers import BoundRegister, Register, RegisterMap
from vfiotool.vfio.space import AddressSpace, StillMapped
from vfiotool.vfio.target import SERVED, Target, find
from vfiotool.vfio.trace import Trace, differences, load
from vfiotool.vfio.user_channel import UserChannel, UserFailure
from vfiotool.vfio.user_connect import is_sealed
from vfiotool.vfio.user_message import UserCommand, UserMessage, UserProtocolError

__all__ = [
    "BACKENDS",
    "FEATURE_GET",
    "FEATURE_PROBE",
    "FEATURE_SET",
    "IRQ_NAMES",
    "SERVED",
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
    "UserChannel",
    "UserCommand",
    "UserFailure",
    "UserMessage",
    "UserProtocolError",
    "backend_named",
    "differences",
    "dma_of",
    "find",
    "is_sealed",
    "load",
    "open_dmabuf",
    "open_space",
    "plane_kind",
    "primary_plane",
    "probe",
    "read_plane",
    "refuse_child",
    "user_message",
]
