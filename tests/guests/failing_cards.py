"""Cards that go wrong in a virtual machine, as models; and the guest that has them.

Each has a device number of its own, by which it is found in the guest whatever its address.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfiotool.lab.machines import DeviceModel, Machine, VfioUserDevice, device, root_port
from vfiotool.models import Model, ModelServer
from vfiotool.models.bar import memory_bar

MIB = 1 << 20
_FIRST_EXTENDED = 0x100
# PCI Express Base 5.0, 7.7.8: an ACS capability; without a bit of its own, all that there is to be
# isolated is.
_ACS = struct.pack("<IHH", 0x0001_000D, 0, 0)


class Card(Model):
    """A network card of plain storage. Its storage keeps what is written until it is reset."""

    class_code = 0x020000
    bars = (memory_bar(0, 64 << 10),)


class SplitCard(Card):
    """A function in a group of its own which is reset with its bus alone."""

    resets = False

    def __init__(self) -> None:
        super().__init__()
        self.config.data[_FIRST_EXTENDED : _FIRST_EXTENDED + len(_ACS)] = _ACS
        # As from power on, which a reset leads back to.
        self.config._first = bytes(self.config.data)
        self.has_reset = True


class Split0(SplitCard):
    device = 0x0A00


class Split1(SplitCard):
    device = 0x0A01


class Joined0(Card):
    """Two functions in one group, each with a reset of its own."""

    device = 0x0B00


class Joined1(Card):
    device = 0x0B01


class Paired0(Card):
    """Two functions in one group, reset with their bus alone."""

    device = 0x0C00
    resets = False

    def __init__(self) -> None:
        super().__init__()
        self.has_reset = True


class Paired1(Paired0):
    device = 0x0C01


class Alone(Card):
    """Beside others on the root bus, and without a reset."""

    device = 0x0D00
    resets = False


class Sleeper(Card):
    """May not come back from D3hot."""

    device = 0x0E00


class Wide(Card):
    """With a BAR of 64 bits, and near the second NUMA node."""

    device = 0x0F00
    bars = (memory_bar(0, MIB, wide=True, prefetchable=True),)


# Where each is: port, function.
_PLACES: dict[type[Card], tuple[str, int]] = {
    Split0: ("rp1", 0),
    Split1: ("rp1", 1),
    Joined0: ("rp2", 0),
    Joined1: ("rp2", 1),
    Paired0: ("rp3", 0),
    Paired1: ("rp3", 1),
    Sleeper: ("rp4", 0),
    Wide: ("far", 0),
}


def _properties(kind: type[Card]) -> tuple[tuple[str, str], ...]:
    if kind is Alone:
        return (("bus", "pcie.0"), ("addr", "0x5"))
    bus, function = _PLACES[kind]
    more = (("multifunction", "on"),) if function == 0 else ()
    return (("bus", bus), ("addr", f"0x0.{function:#x}"), *more)


_DEVICES = (
    *(root_port(number, **{"x-speed": "2_5"}) for number in (1, 2, 3, 4)),
    DeviceModel(
        "pxb-pcie",
        (
            ("id", "pxb"),
            ("bus", "pcie.0"),
            ("addr", "0xa"),
            ("bus_nr", "128"),
            ("numa_node", "1"),
        ),
    ),
    device("pcie-root-port", id="far", bus="pxb", chassis="20"),
)


@contextmanager
def failing_machine(folder: Path) -> Iterator[tuple[Machine, dict[str, Model]]]:
    """The machine, its cards served until the end of the block, and they by their names."""
    kinds: tuple[type[Card], ...] = (*_PLACES, Alone)
    served, models = [], {}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            model = models[kind.__name__] = kind()
            server = ModelServer(model, str(folder / f"{kind.__name__}.sock"))
            stack.enter_context(server)
            served.append(VfioUserDevice(server.path, _properties(kind)))
        yield (
            Machine(
                "failing",
                "cards that go wrong in a virtual machine",
                _DEVICES,
                memory_mib=3072,
                iommu_bits=39,
                numa_nodes=2,
                served=tuple(served),
            ),
            models,
        )
