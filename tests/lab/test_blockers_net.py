"""Every way in which a network card can be in use, produced for real; `why` names it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.blockers_guest import PCI, assert_passable, blockers, need, run, wait_for, why
from vfiotool.host.host import Host
from vfiotool.netlink.route import VfSettings, read_addresses, read_vf_settings, set_vf

MACHINE = "net"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.12",)

CARDS = {"e1000e": "0x10d3", "igb": "0x10c9"}


def card(model: str, index: int = 0) -> str:
    """The address of a card of that model; bus numbers depend on what this QEMU has."""
    found = sorted(
        folder.name
        for folder in PCI.iterdir()
        if (folder / "device").read_text().strip() == CARDS[model]
        and (folder / "vendor").read_text().strip() == "0x8086"
    )
    if len(found) <= index:
        pytest.skip(f"this machine's QEMU has no {model}")
    return found[index]


def interface(address: str) -> str:
    folder = PCI / address / "net"
    if not (PCI / address / "driver").exists():
        pytest.skip(f"this kernel has no driver for {address}")
    wait_for(lambda: folder.is_dir() and list(folder.iterdir()), f"an interface of {address}")
    return next(folder.iterdir()).name


@pytest.fixture(autouse=True)
def clean() -> Iterator[ExitStack]:
    """Undoes what a test did, last first, and holds that the card is free again."""
    need("vfio-pci")
    with ExitStack() as stack:
        yield stack
    assert_passable(card("e1000e"))


@pytest.fixture
def nic() -> str:
    return card("e1000e")


def add_address(stack: ExitStack, name: str, cidr: str) -> None:
    run("ip", "address", "add", cidr, "dev", name)
    stack.callback(run, "ip", "address", "flush", "dev", name)


def test_an_interface_that_is_only_up_is_passable(clean: ExitStack, nic: str) -> None:
    name = interface(nic)
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    assert_passable(nic)


def test_an_address_and_the_default_route_are_named(clean: ExitStack, nic: str) -> None:
    name = interface(nic)
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    add_address(clean, name, "10.77.0.2/24")
    (entry,) = blockers(nic, "route")
    assert entry["detail"].startswith(f"{name} has 10.77.0.2/24")
    assert "default route" not in entry["detail"]
    assert why(nic)[1]["next"][0] == f"ip address flush dev {name}"
    run("ip", "route", "add", "default", "via", "10.77.0.1", "dev", name)
    code, answer = why(nic)
    (entry,) = answer["blockers"]
    assert (code, entry["kind"], entry["subject"], entry["device"]) == (1, "route", name, nic)
    assert "carries the default route (default via 10.77.0.1)" in entry["detail"]
    assert f"/proc/net/route name {name}" in entry["evidence"]
    # Ending the host's only way out is a warning, and never a step.
    assert answer["next"] == []
    (warning,) = answer["warnings"]
    assert "would cut this host off" in warning
    assert_passable(card("e1000e", 1))


def test_an_ipv6_default_route_is_named(clean: ExitStack, nic: str) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    name = interface(nic)
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    add_address(clean, name, "fd77::2/64")
    run("ip", "-6", "route", "add", "default", "via", "fd77::1", "dev", name)
    clean.callback(run, "ip", "-6", "route", "flush", "dev", name)
    (entry,) = blockers(nic, "route")
    assert "fd77::2/64" in entry["detail"]
    assert "default ::/0 via fd77::1" in entry["detail"]


def test_the_interface_of_the_ssh_session_is_named(clean: ExitStack, nic: str) -> None:
    name = interface(nic)
    add_address(clean, name, "10.77.0.2/24")
    # As sshd sets it for the login shell, whose environment sudo then drops.
    session = "10.77.0.9 50000 10.77.0.2 22"
    program = (
        "import os, subprocess, sys; os.environ.pop('SSH_CONNECTION');"
        "command = [sys.executable, '-m', 'vfiotool', '--json', 'why', sys.argv[1]];"
        "sys.exit(subprocess.call(command))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, nic],
        env={"SSH_CONNECTION": session, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (entry,) = json.loads(done.stdout)["blockers"]
    assert "carries your SSH session from 10.77.0.9 to 10.77.0.2" in entry["detail"]
    assert "SSH_CONNECTION" in entry["evidence"]


def test_a_bridge_port(clean: ExitStack, nic: str) -> None:
    need("bridge")
    name = interface(nic)
    run("ip", "link", "add", "br7", "type", "bridge")
    clean.callback(run, "ip", "link", "delete", "br7")
    assert_passable(nic)
    run("ip", "link", "set", name, "master", "br7")
    add_address(clean, "br7", "10.78.0.1/24")
    found = {entry["kind"]: entry for entry in why(nic)[1]["blockers"]}
    assert set(found) == {"bridge-or-bond", "route"}
    assert found["bridge-or-bond"]["detail"] == f"{name} is a port of the bridge br7"
    assert Path(f"/sys/class/net/{name}/master").resolve().name == "br7"
    assert found["route"]["detail"].startswith(f"br7 (over {name}) has 10.78.0.1/24")
    run("ip", "link", "set", name, "nomaster")
    assert_passable(nic)


@pytest.mark.parametrize("kind", ["bond", "team"])
def test_a_bond_or_team_member(clean: ExitStack, nic: str, kind: str) -> None:
    need({"bond": "bonding"}.get(kind, kind))
    name = interface(nic)
    run("ip", "link", "add", "upper7", "type", kind)
    clean.callback(run, "ip", "link", "delete", "upper7")
    run("ip", "link", "set", name, "down")
    run("ip", "link", "set", name, "master", "upper7")
    (entry,) = blockers(nic, "bridge-or-bond")
    assert entry["detail"] == f"{name} is a port of the {kind} upper7"
    run("ip", "link", "set", name, "nomaster")
    run("ip", "link", "set", name, "down")
    assert_passable(nic)


@pytest.mark.parametrize("kind", ["vlan", "macvlan"])
def test_an_interface_on_top(clean: ExitStack, nic: str, kind: str) -> None:
    need({"vlan": "8021q"}.get(kind, kind))
    name = interface(nic)
    more = ["id", "7"] if kind == "vlan" else []
    run("ip", "link", "add", "upper7", "link", name, "type", kind, *more)
    clean.callback(run, "ip", "link", "delete", "upper7")
    (entry,) = blockers(nic, "bridge-or-bond")
    assert entry["detail"] == f"the {kind} upper7 stands on {name}"
    assert Path(entry["evidence"]).is_symlink()


def test_an_interface_in_another_network_namespace(clean: ExitStack, nic: str) -> None:
    name = interface(nic)
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this kernel has no network namespaces")
    child = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    clean.callback(wait_for, lambda: (PCI / nic / "net").is_dir(), "the interface to come back")
    clean.callback(child.wait, 30)
    clean.callback(child.stdin.close)
    assert child.stdout.readline() == "ready\n"
    run("ip", "link", "set", name, "netns", str(child.pid))
    enter = ("nsenter", "--target", str(child.pid), "--net")
    run(*enter, "ip", "address", "add", "10.79.0.1/24", "dev", name)
    (entry,) = blockers(nic, "route")
    expected = f"{name} lives in the network namespace of pid {child.pid} with 10.79.0.1/24"
    assert entry["detail"] == expected
    assert entry["evidence"] == f"/proc/{child.pid}/ns/net"


def test_enabled_vfs_keep_their_function_in_use(clean: ExitStack) -> None:
    igb = card("igb")
    interface(igb)
    numvfs = PCI / igb / "sriov_numvfs"
    assert_passable(igb)
    numvfs.write_text("2")
    clean.callback(numvfs.write_text, "0")
    (entry,) = blockers(igb, "vfs-enabled")
    assert entry["evidence"] == f"{numvfs} is 2"
    assert entry["detail"].startswith("2 VFs are enabled")
    assert f"vfiotool vf set {igb} 0" in why(igb)[1]["next"]
    vf = (PCI / igb / "virtfn0").resolve().name
    assert blockers(vf, "vfs-enabled") == []
    numvfs.write_text("0")
    assert_passable(igb)


def test_vf_settings_are_written_and_read_back_as_ip_shows_them(clean: ExitStack) -> None:
    igb = card("igb")
    name = interface(igb)
    numvfs = PCI / igb / "sriov_numvfs"
    numvfs.write_text("2")
    clean.callback(numvfs.write_text, "0")
    index = socket.if_nametoindex(name)
    wanted = VfSettings(1, mac="52:54:00:aa:bb:01", vlan=7, qos=3, spoof_check=False, trust=True)
    Host.local().send_netlink(set_vf(index, wanted))
    found = {vf.index: vf for vf in read_vf_settings(index)}
    assert set(found) == {0, 1}
    assert (found[1].mac, found[1].vlan, found[1].qos) == ("52:54:00:aa:bb:01", 7, 3)
    assert (found[1].spoof_check, found[1].trust) == (False, True)
    shown = json.loads(run("ip", "-json", "link", "show", name))[0]["vfinfo_list"]
    for vf in shown:
        ours = found[vf["vf"]]
        assert ours.mac == vf["address"]
        assert ours.spoof_check == vf["spoofchk"]
        assert ours.trust == vf["trust"]


def test_addresses_are_those_that_ip_shows(clean: ExitStack, nic: str) -> None:
    name = interface(nic)
    add_address(clean, name, "10.77.0.2/24")
    run("ip", "address", "add", "10.90.0.1", "peer", "10.90.0.2/32", "dev", name)
    shown = {
        (link["ifname"], f"{entry['local']}/{entry['prefixlen']}")
        for link in json.loads(run("ip", "-json", "address", "show"))
        for entry in link["addr_info"]
    }
    assert set(read_addresses()) == shown
