"""A bridge whose hotplug driver keeps its group from user space: what `why` says works."""

from __future__ import annotations

import pytest

from tests.fakes.kernel import end_state
from tests.lab.commands import driver_of, modprobe, vfiotool
from vfiotool.host.host import Host

MACHINE = "native-hotplug"
KERNELS = ("6.1", "6.12", "iommufd")


@pytest.fixture
def edu() -> tuple[str, str]:
    """edu behind the bridge, and the bridge, which is on shpchp."""
    modprobe("vfio-pci")
    groups = [group["devices"] for group in vfiotool("groups", "--json").json["groups"]]
    ids = [[one["device"] for one in members] for members in groups]
    bridge, found, _ = groups[ids.index(["000e", "11e8", "0005"])]
    assert bridge["driver"] == "shpchp"
    return found["address"], bridge["address"]


def test_the_commands_that_why_names_make_the_group_usable(edu: tuple[str, str]) -> None:
    address, bridge = edu
    before = end_state(Host.local())
    assert vfiotool("bind", address).code == 0
    # The kernel agrees that shpchp is in the way: it does not let the group be opened.
    refused = vfiotool("demo", "edu", address)
    assert refused.code == 4 and "not viable" in refused.err
    asked = vfiotool("why", address, "--json")
    assert asked.code == 1
    assert [entry["kind"] for entry in asked.json["blockers"]] == ["group-member"]
    assert asked.json["next"][0] == f"vfiotool bind {bridge} --driver none"
    assert vfiotool(*asked.json["next"][0].split()[1:]).code == 0
    assert driver_of(bridge) is None
    assert vfiotool("why", address).code == 0
    assert vfiotool("demo", "edu", address).code == 0
    assert vfiotool("release", address, bridge).code == 0
    assert driver_of(bridge) == "shpchp"
    assert end_state(Host.local()) == before
