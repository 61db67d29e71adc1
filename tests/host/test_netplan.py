"""What netplan sets of VFs is recognized as netplan means it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.devices.inventory import read_inventory
from vfiotool.doctor.claims import Claim, resolve_claim
from vfiotool.host.netplan import netplan_claims

FIELD = Path(__file__).resolve().parents[2] / "fixtures/field/42-import-vf-settings"
HEAD = "network:\n  version: 2\n  ethernets:\n"


def test_a_link_an_eswitch_and_a_match_are_claims_of_the_card() -> None:
    assert list(netplan_claims((FIELD / "01-sriov.yaml").read_text())) == [
        ("interface:engreen", "link=1 embedded-switch-mode=switchdev"),
        ("netdriver:mlx5_core", "virtual-function-count=4"),
    ]


@pytest.mark.parametrize(
    ("body", "device"),
    [
        ("", "interface:card"),
        ("      match: {name: 'enp*'}\n", "interface:enp*"),
        ("      match:\n        macaddress: AA:BB:CC:00:11:22\n", "mac:aa:bb:cc:00:11:22"),
        ("      match: {driver: ice}\n      set-name: wan0\n", "interface:wan0"),
    ],
)
def test_a_definition_with_a_match_means_what_that_names(body: str, device: str) -> None:
    text = f"{HEAD}    card:\n      virtual-function-count: 2 # two\n{body}"
    assert list(netplan_claims(text)) == [(device, "virtual-function-count=2")]


def test_flow_style_is_read_and_other_interfaces_are_no_claims() -> None:
    text = f"{HEAD}    a: {{virtual-function-count: 3, match: {{driver: ixgbe}}}}\n"
    text += "    b: {dhcp4: true}\n    c:\n      dhcp4: true\n"
    assert list(netplan_claims(text)) == [("netdriver:ixgbe", "virtual-function-count=3")]
    assert list(netplan_claims(": : :\n\t- {[")) == []


def test_a_pattern_and_a_driver_resolve_to_the_functions_that_they_name() -> None:
    small = SmallHost()
    for number, (address, driver) in enumerate(
        (("0000:01:00.0", "ice"), ("0000:02:00.0", "igb"), ("0000:03:00.0", "ice"))
    ):
        base = small.function(address, group=number, driver=driver)
        if number < 2:
            small.file(f"{base}/net/enp{number}s0/ifindex", str(number + 2))
            small.link(f"/sys/class/net/enp{number}s0", f"{base}/net/enp{number}s0")
    host = small.host()
    inventory = read_inventory(host)

    def meant(device: str) -> tuple[str, ...]:
        return resolve_claim(host, inventory, Claim("netplan", "/etc/netplan/1.yaml", device, ""))

    assert meant("interface:enp*") == ("0000:01:00.0", "0000:02:00.0")
    # A function of that driver without an interface is none that netplan sees.
    assert meant("netdriver:ice") == ("0000:01:00.0",)
    assert meant("interface:enp9s0") == ()
