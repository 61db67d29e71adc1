"""VF settings over rtnetlink and eswitch modes over devlink, on the kernel's own simulated card.

Debian's kernels are built without it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.blockers_guest import need, run, wait_for
from vfiotool.errors import KernelError
from vfiotool.host.host import Host
from vfiotool.netlink import codec as netlink
from vfiotool.netlink import devlink as netlink_devlink
from vfiotool.netlink.route import VfSettings, read_links, read_vf_settings, set_vf

MACHINE = "basic"
KERNELS = ("iommufd",)

BUS = Path("/sys/bus/netdevsim")


@pytest.fixture
def card() -> Iterator[str]:
    """The interface of a simulated card with three VFs."""
    need("netdevsim", tools=("ip", "devlink"))
    (BUS / "new_device").write_text("7 1")
    device = BUS / "devices" / "netdevsim7"
    try:
        wait_for((device / "net").is_dir, "the simulated interface")
        (device / "sriov_numvfs").write_text("3")
        yield next((device / "net").iterdir()).name
    finally:
        (BUS / "del_device").write_text("7")


def shown_by_ip(name: str) -> list[dict[str, object]]:
    found = json.loads(run("ip", "-json", "link", "show", name))[0]["vfinfo_list"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "wanted",
    [
        VfSettings(1, mac="52:54:00:aa:bb:01"),
        VfSettings(1, vlan=7, qos=3),
        VfSettings(1, spoof_check=False),
        VfSettings(1, spoof_check=True, trust=True),
        VfSettings(1, min_rate_mbps=10, max_rate_mbps=1000),
        VfSettings(1, link_state=2),
        VfSettings(2, mac="52:54:00:aa:bb:02", vlan=9, trust=True, max_rate_mbps=5),
    ],
    ids=str,
)
def test_settings_arrive_and_nothing_else_changes(card: str, wanted: VfSettings) -> None:
    index = socket.if_nametoindex(card)
    before = {vf.index: vf for vf in read_vf_settings(index)}
    assert set(before) == {0, 1, 2}
    Host.local().send_netlink(set_vf(index, wanted))
    after = {vf.index: vf for vf in read_vf_settings(index)}
    fields = ("mac", "vlan", "qos", "spoof_check", "trust", "min_rate_mbps", "max_rate_mbps")
    for name in (*fields, "link_state"):
        asked = getattr(wanted, name)
        expected = getattr(before[wanted.index], name) if asked is None else asked
        # VLAN and priority go together, as do the rates: the one not given becomes 0.
        if asked is None and name == "qos" and wanted.vlan is not None:
            expected = 0
        if asked is None and name == "min_rate_mbps" and wanted.max_rate_mbps is not None:
            expected = 0
        assert getattr(after[wanted.index], name) == expected, name
    others = set(before) - {wanted.index}
    assert all(after[number] == before[number] for number in others)


def test_what_is_read_is_what_ip_shows(card: str) -> None:
    index = socket.if_nametoindex(card)
    Host.local().send_netlink(set_vf(index, VfSettings(1, mac="52:54:00:aa:bb:01", trust=True)))
    ours = {vf.index: vf for vf in read_vf_settings(index)}
    for vf in shown_by_ip(card):
        number = vf["vf"]
        assert isinstance(number, int)
        assert ours[number].mac == vf["address"]
        assert ours[number].trust == vf["trust"]
        assert ours[number].spoof_check == vf["spoofchk"]


def test_a_vf_that_is_not_there_is_the_kernels_error(card: str) -> None:
    index = socket.if_nametoindex(card)
    with pytest.raises(KernelError, match=f"set VF 9 of interface {index}: ") as caught:
        Host.local().send_netlink(set_vf(index, VfSettings(9, trust=True)))
    assert caught.value.errno_name == "EINVAL"


def test_an_interface_names_the_device_that_it_belongs_to(card: str) -> None:
    (link,) = [link for link in read_links() if link.name == card]
    assert (link.parent_bus, link.parent_device) == ("netdevsim", "netdevsim7")


def test_an_eswitch_changes_its_mode_and_back(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink_devlink, "_BUS", "netdevsim")
    host = Host.local()
    name = "netdevsim7"

    def told_by_devlink() -> str:
        shown = json.loads(run("devlink", "-j", "dev", "eswitch", "show", f"netdevsim/{name}"))
        return str(shown["dev"][f"netdevsim/{name}"]["mode"])

    with netlink.Socket(netlink.NETLINK_GENERIC, 5.0) as channel:
        family = netlink.resolve_family(channel, netlink_devlink.FAMILY)
    assert netlink_devlink.read_eswitch(name, 5.0) == told_by_devlink() == "legacy"
    for mode in ("switchdev", "legacy"):
        host.send_netlink(netlink_devlink.set_eswitch(family, name, mode))
        assert netlink_devlink.read_eswitch(name, 5.0) == told_by_devlink() == mode


def test_a_device_without_an_eswitch_has_no_mode(card: str) -> None:
    assert netlink_devlink.read_eswitch("0000:00:01.0", 5.0) is None
