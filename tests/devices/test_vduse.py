"""VDUSE devices as a host shows them: served, mute, abandoned, and what that means to others."""

from __future__ import annotations

import json

import pytest

from vfiotool.change import guard
from vfiotool.cli.main import main
from vfiotool.devices.vduse import VduseNode, read_vduse
from vfiotool.errors import Refused
from vfiotool.host.host import Host
from vfiotool.host.paths import BLOCK_CLAIM, MOUNTS, OPEN_NODES, SYS_BLOCK
from vfiotool.host.tree import MemoryTree
from vfiotool.usage.survey import blockers

DEVICE = "/sys/devices/virtual/vduse/vd0"
SERVER = f"77\tvfiotool\t/dev/vduse/vd0\t{DEVICE}\n"


def a_host(
    *, holders: str = "", in_flight: str = "0 0", process: str = "S", driver: bool = True
) -> Host:
    files = {
        f"{DEVICE}/uevent": "",
        OPEN_NODES: f"{holders}.\n",
        MOUNTS: ".\n",
        f"{BLOCK_CLAIM}/vda": "free",
        "/proc/77/stat": f"77 (vfio) tool) {process} 1 77",
    }
    links = {
        "/sys/class/vduse/control": "/sys/devices/virtual/vduse/control",
        "/sys/class/vduse/vd0": DEVICE,
        "/sys/bus/vdpa/devices/vd0": f"{DEVICE}/vd0",
        f"{DEVICE}/vd0/driver": "/sys/bus/vdpa/drivers/virtio_vdpa",
    }
    if driver:
        links[f"{DEVICE}/vd0/virtio3/driver"] = "/sys/bus/virtio/drivers/virtio_blk"
        links[f"{SYS_BLOCK}/vda"] = f"{DEVICE}/vd0/virtio3/block/vda"
        files[f"{DEVICE}/vd0/virtio3/block/vda/inflight"] = in_flight
    else:
        files[f"{DEVICE}/vd0/virtio3/uevent"] = ""
    tree = MemoryTree({path: text.encode() for path, text in files.items()}, links)
    return Host(tree, live=False, name="a host")


def test_a_device_is_served_by_who_holds_it() -> None:
    assert read_vduse(a_host(holders=SERVER)) == (
        VduseNode(
            "vd0", "served", 77, "vfiotool", True, "virtio_vdpa", None, ("vda",), in_flight=0
        ),
    )
    assert not [item for item in blockers(a_host(holders=SERVER), "vd0") if "server" in item.kind]


@pytest.mark.parametrize(
    ("host", "state", "words"),
    [
        (a_host(in_flight="3  4"), "abandoned", "its server is gone, with 7 requests in flight"),
        (a_host(), "abandoned", "its server is gone"),
        (a_host(holders=SERVER, process="T"), "mute", "pid 77 (vfiotool), does not answer"),
        (a_host(holders=SERVER, driver=False), "mute", "pid 77 (vfiotool), does not answer"),
    ],
)
def test_one_without_a_server_is_not_taken_away(host: Host, state: str, words: str) -> None:
    (device,) = read_vduse(host)
    assert (device.state, device.waits) == (state, True)
    (found,) = [item for item in blockers(host, "vd0") if item.kind == "no-server"]
    assert words in found.detail and found.remedy == "vfiotool vduse rescue vd0"


def test_who_may_not_look_does_not_call_it_abandoned() -> None:
    hidden = a_host(holders="!\tthe open files of 3 processes that may not be looked into\n")
    assert read_vduse(hidden)[0].state == "unknown"


def test_a_host_without_vduse_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_vduse(Host(MemoryTree({}, {}), live=False, name="empty")) == ()
    assert main(["--root", "fixtures/hosts/virtio-iommu", "--json", "vduse", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format_version": "1.0", "vduses": []}
    assert main(["--root", "fixtures/hosts/virtio-iommu", "vduse", "rescue", "vd0"]) in (2, 3)


def test_no_allowance_takes_one_without_a_server_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its removal would wait for ever and hold all of vDPA's lock."""
    host = a_host(in_flight="1  0")
    found = tuple(item for item in blockers(host, "vd0") if item.kind == "no-server")
    monkeypatch.setattr(guard, "look_at", lambda *_: guard.Look(found))
    with pytest.raises(Refused, match="its server is gone") as refused:
        guard.refuse_uses(host, (), [guard.Allowance("no-server", "vd0")])
    assert (refused.value.hint or "").startswith("vfiotool vduse rescue vd0")
