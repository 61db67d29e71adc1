"""Devices of each kind as they are handed over, for the tests of what hypervisors are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vfiotool.devices.inventory import read_inventory
from vfiotool.netlink.route import VfSettings
from vfiotool.snapshot.load import open_root
from vfiotool.vm.handed import Handed, handed_socket

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def function(name: str, **changes: Any) -> Handed:
    template = read_inventory(open_root(str(HOSTS / "shared-group"))).by_address["0000:02:01.0"]
    own = replace(template, address=name, **changes)
    return Handed(name, f"/sys/bus/pci/devices/{name}", "vfio-pci", 5, own)


def vf(name: str = "0000:03:10.0") -> Handed:
    own = function(name, physfn="0000:03:00.0", vf_index=0, class_code="020000", vendor="8086")
    return replace(own, network=VfSettings(0, mac="52:54:00:00:00:01", vlan=10))


GPU = [function("0000:01:00.0", class_code="030000"), function("0000:01:00.1")]
WIDE = function("10000:e1:00.0")
MDEV = Handed(UUID, f"/sys/bus/mdev/devices/{UUID}", "vfio-pci", 7, None, type="GRID T4-2Q")
CCW = replace(MDEV, model="vfio-ccw")
AP = replace(MDEV, model="vfio-ap")
NET = Handed("vdpa0", "/dev/vhost-vdpa-0", "vdpa", None, None, virtio="net")
BLOCK = replace(NET, name="vdpa1", path="/dev/vhost-vdpa-1", virtio="block")
DISK = handed_socket("vhost-user-blk", "/run/vm1.sock")
NIC = handed_socket("vhost-user-net", "/run/net1.sock")
USER = handed_socket("vfio-user", "/run/edu.sock")
VGPU = function("0000:41:00.4", driver="nvidia", physfn="0000:41:00.0", class_code="030200")
