"""Facts of a physical function: where its VFs will be, and which driver may make them."""

from __future__ import annotations

import pytest

from vfiotool.change.plans.facts import DeviceFacts, Facts, SriovFacts, vf_address, vf_routing
from vfiotool.change.plans.sriov import PfGoal, plan_pf
from vfiotool.change.steps.state import Binding, Identity
from vfiotool.errors import Refused

PF = "0000:fe:1f.7"


def card(**known: int | None) -> SriovFacts:
    places = {"offset": 1, "stride": 2, **known}
    return SriovFacts(8, 0, True, places["offset"], places["stride"], "10ca", ())


@pytest.mark.parametrize("unknown", ["offset", "stride"])
def test_a_vfs_place_is_not_known_where_the_host_does_not_tell(unknown: str) -> None:
    assert vf_routing(PF, card(**{unknown: None}), 0) is None
    assert vf_address(PF, card(**{unknown: None}), 0) is None


@pytest.mark.parametrize(
    ("offset", "place"),
    [(1, "0000:ff:00.0"), (256, "0000:ff:1f.7"), (257, None)],
)
def test_a_vf_lies_on_the_last_bus_at_most(offset: int, place: str | None) -> None:
    """The routing id has 16 bits: the last one is a place, the next one is none."""
    assert vf_address(PF, card(offset=offset), 0) == place


def test_a_vf_that_stands_is_where_it_stands() -> None:
    standing = SriovFacts(8, 1, True, 1, 2, "10ca", ("0000:01:00.1",))
    assert vf_address(PF, standing, 0) == "0000:01:00.1"
    assert vf_address(PF, standing, 1) == "0000:ff:00.2"


@pytest.mark.parametrize(
    ("bound", "wanted", "option", "refused"),
    [
        ("vfio-pci", None, False, True),
        ("vfio-pci", None, None, True),
        ("vfio-pci", None, True, False),
        ("vfio-pci", "vfio-pci", None, True),
        ("vfio-pci", "igb", False, False),
        ("igb", None, False, False),
        ("igb", "igb", False, False),
        ("igb", "vfio-pci", False, True),
        # Not loaded yet: its option is told when it is.
        ("igb", "vfio-pci", None, False),
        ("igb", "vfio-pci", True, False),
    ],
)
def test_vfio_pci_makes_vfs_by_its_option_alone(
    bound: str, wanted: str | None, option: bool | None, refused: bool
) -> None:
    override = bound if bound == "vfio-pci" else None
    device = DeviceFacts(
        "0000:01:00.0",
        Identity("8086", "10c9", None),
        "020000",
        Binding(bound, override),
        1,
        None,
        card(),
        None,
        "vfio-pci",
    )
    facts = Facts(
        {device.address: device}, {}, frozenset({"igb", "vfio-pci"}), vfio_makes_vfs=option
    )
    try:
        plan_pf(facts, device.address, PfGoal(2, driver=wanted))
    except Refused as error:
        assert refused and "enable_sriov" in error.message
    else:
        assert not refused
