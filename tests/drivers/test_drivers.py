"""Which driver drives which device, by what each declares."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from vfiotool.cli.drive.opening import driver_and_device
from vfiotool.drivers import DEMOS, demo, driver_of, find_driver, register_map
from vfiotool.errors import NotFound, UsageError


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        ((0x1234, 0x11E8, 0x00FF00), "edu"),
        ((0x1B36, 0x0005, 0x00FF00), "pci_testdev"),
        ((0x4348, 0x3253, 0x070002), "mtty"),
        ((0x144D, 0xA80A, 0x010802), "nvme"),
        ((0x1B36, 0x0010, 0x010802), "nvme"),
        ((0x1234, 0x1111, 0x030000), "mbochs"),
        ((0x1B36, 0x000F, 0x038000), "mdpy"),
        ((0x8086, 0x100E, 0x020000), None),
        ((0x144D, 0xA80A, 0x010601), None),
    ],
)
def test_a_device_finds_its_driver(ids: tuple[int, int, int], name: str | None) -> None:
    assert find_driver(*ids) == name
    device: Any = SimpleNamespace(name="x", vendor=ids[0], device=ids[1], class_code=ids[2])
    if name is not None:
        assert driver_of(device) == name
        return
    with pytest.raises(NotFound, match=r"no driver of vfiotool drives x \(....:...., class"):
        driver_of(device)


@pytest.mark.parametrize("name", DEMOS)
def test_every_driver_declares_what_it_drives(name: str) -> None:
    assert import_module(DEMOS[name]).DRIVES[name]


def test_drivers_are_listed_and_found_as_their_documents_spell_them() -> None:
    assert demo("pci-testdev") is demo("pci_testdev")
    with pytest.raises(NotFound) as refused:
        demo("edo")
    assert refused.value.hint == "one of: edu, mbochs, mdpy, mtty, nvme, pci-testdev"
    device: Any = None
    with pytest.raises(NotFound, match="declares registers"):
        register_map("edo", device)


def test_the_drivers_name_may_be_left_out() -> None:
    assert driver_and_device(["05:01.0"]) == (None, "05:01.0")
    assert driver_and_device(["pci-testdev", "05:01.0"]) == ("pci_testdev", "05:01.0")
    with pytest.raises(UsageError, match="at most"):
        driver_and_device(["edu", "05:01.0", "more"])
