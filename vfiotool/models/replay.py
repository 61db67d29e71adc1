"""A card that is played from its configuration space, as a snapshot has it.

It has the ids, capabilities and BARs of the original and answers as plain storage: enough for the
PCI core, for IOMMU groups and for vfio-pci, and for no driver of its own. What a running system had
put into configuration space (COMMAND, base addresses, interrupts on, D3hot) is as at power on.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfiotool.errors import UsageError
from vfiotool.models.bar import BarSpec
from vfiotool.models.config import BARS, COMMAND, MSI, MSIX, PM, ModelConfig
from vfiotool.models.device import Model

# Of a line of sysfs's `resource` (include/linux/ioport.h): I/O, memory, prefetchable, 64 bits.
_PORTS, _MEMORY, _PREFETCH, _WIDE = 0x100, 0x200, 0x2000, 0x100000
_BAR_COUNT = 6
_NO_CAPABILITY = 0x00
# A file of memory this large is sparse, and more than any BAR that is made.
_LARGEST_BAR = 1 << 40

Resource = tuple[int, int, int]


def parse_resources(text: str) -> tuple[Resource, ...]:
    """The lines of sysfs's `resource`: (start, last, flags). What is no line is an unused one."""
    found = []
    for line in text.splitlines():
        words = line.split()
        try:
            start, last, flags = (int(word, 16) for word in words)
        except ValueError:
            start, last, flags = 0, 0, 0
        found.append((start, last, flags))
    return tuple(found)


def bars_of(resources: Sequence[Resource]) -> tuple[BarSpec, ...]:
    """The BARs that these resources are, of the same kinds and sizes."""
    found: list[BarSpec] = []
    for index, (start, last, flags) in enumerate(resources[:_BAR_COUNT]):
        if found and found[-1].wide and found[-1].index == index - 1:
            continue
        size = last - start + 1
        if not flags & (_PORTS | _MEMORY) or size < 4 or size & (size - 1) or size > _LARGEST_BAR:
            continue
        ports = bool(flags & _PORTS)
        wide = bool(flags & _WIDE) and not ports and index < _BAR_COUNT - 1
        prefetchable = bool(flags & _PREFETCH) and not ports
        found.append(BarSpec(index, size, ports=ports, wide=wide, prefetchable=prefetchable))
    return tuple(found)


class ReplayModel(Model):
    """A card from 64, 256 or 4096 bytes of configuration space and the lines of `resource`."""

    def __init__(self, config: bytes, resources: Sequence[Resource]) -> None:
        if len(config) < 64 or config[0x0E] & 0x7F:
            raise UsageError("only an endpoint's configuration space can be replayed")
        specs = bars_of(resources)
        made = ModelConfig(_at_power_on(config, specs))
        for spec in specs:
            made.open_bar(spec)
        self._counts = _interrupts(made)
        self._make(made, specs)

    def interrupt_counts(self) -> tuple[int, ...]:
        return (*self._counts, 0, 1)


def _at_power_on(config: bytes, specs: Sequence[BarSpec]) -> bytes:
    size = 4096 if len(config) > 256 else 256
    data = bytearray(config[:size].ljust(size, b"\0"))
    data[COMMAND : COMMAND + 2] = b"\0\0"
    data[BARS : BARS + 4 * _BAR_COUNT] = bytes(4 * _BAR_COUNT)
    data[0x30:0x34] = bytes(4)
    for spec in specs:
        data[BARS + 4 * spec.index] = spec.config_flags
    if len(config) < 256:
        # Only the header was readable, and so nothing that it points to.
        data[0x06] &= ~0x10
        data[0x34] = 0
    places = ModelConfig(bytes(data)).capabilities
    if PM in places:
        data[places[PM] + 4] &= ~3
    if MSI in places:
        data[places[MSI] + 2] &= ~0x71
    if MSIX in places:
        data[places[MSIX] + 3] &= 0x3F
        if not _table_fits(data, places[MSIX], specs):
            data[places[MSIX]] = _NO_CAPABILITY
    return bytes(data)


def _table_fits(data: bytearray, place: int, specs: Sequence[BarSpec]) -> bool:
    sizes = {spec.index: spec.size for spec in specs if not spec.ports}
    count = (int.from_bytes(data[place + 2 : place + 4], "little") & 0x7FF) + 1
    for at, length in ((place + 4, 16 * count), (place + 8, -(-count // 64) * 8)):
        word = int.from_bytes(data[at : at + 4], "little")
        if (word & ~7) + length > sizes.get(word & 7, 0):
            return False
    return True


def _interrupts(config: ModelConfig) -> tuple[int, int, int]:
    data, places = config.data, config.capabilities
    msi = msix = 0
    if MSI in places:
        msi = 1 << (data[places[MSI] + 2] >> 1 & 7)
    if MSIX in places:
        at = places[MSIX] + 2
        msix = (int.from_bytes(data[at : at + 2], "little") & 0x7FF) + 1
    return int(data[0x3D] != 0), msi, msix
