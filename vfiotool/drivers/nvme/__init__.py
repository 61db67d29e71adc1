"""The NVMe driver: what a program uses of it.

`Controller` brings a controller up, `IoQueue` is a queue pair for one thread, `SharedQueue` and
`AsyncQueue` one for many threads and for coroutines. Rarer commands stand in modules that are
imported by name: `from vfiotool.drivers.nvme import admin`.
"""

from vfiotool.drivers.nvme.aio import AsyncQueue
from vfiotool.drivers.nvme.batch import Batch
from vfiotool.drivers.nvme.bench import PATTERNS, PERCENTILES, Job
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import COMMAND_SETS, ControllerIdentity, Namespace
from vfiotool.drivers.nvme.io import IoQueue
from vfiotool.drivers.nvme.load import LoadReport
from vfiotool.drivers.nvme.memory_buffer import MemoryBuffer
from vfiotool.drivers.nvme.queue_pair import Completion
from vfiotool.drivers.nvme.shared import SharedQueue
from vfiotool.drivers.nvme.status import failed_with

__all__ = [
    "COMMAND_SETS",
    "PATTERNS",
    "PERCENTILES",
    "AsyncQueue",
    "Batch",
    "Completion",
    "Controller",
    "ControllerIdentity",
    "IoQueue",
    "Job",
    "LoadReport",
    "MemoryBuffer",
    "Namespace",
    "SharedQueue",
    "admin",
    "bench",
    "blocks",
    "failed_with",
    "spec",
    "tables",
    "virtualization",
]
