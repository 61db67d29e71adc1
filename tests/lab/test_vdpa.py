"""vDPA on a real kernel: what is read agrees with iproute2's `vdpa`, what is changed holds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiotool.cli.main import main

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")

MAC = "52:54:00:12:34:56"
BUS = Path("/sys/bus/vdpa")
SIMULATED = pytest.mark.skipif(
    not Path("/sys/devices/vdpasim_net").exists(), reason="this kernel has no vDPA simulators"
)


def vfiotool(*arguments: str, code: int = 0) -> dict[str, Any]:
    """One command in this process: an interpreter's start takes seconds in a guest."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(["--json", *arguments])
    text = output.getvalue()
    assert status == code, (arguments, status, text, errors.getvalue())
    found: dict[str, Any] = json.loads(text)
    return found


def iproute2(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(["vdpa", "-j", *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def stripped(value: Any) -> Any:
    """Without the blanks at the end of two of iproute2's keys."""
    if isinstance(value, dict):
        return {key.strip(): stripped(item) for key, item in value.items()}
    return value


def names() -> list[str]:
    return sorted(os.listdir(BUS / "devices")) if (BUS / "devices").exists() else []


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every test begins and ends without vDPA devices, with the bus's autoprobe on."""
    assert names() == []
    yield
    for name in names():
        subprocess.run(["vdpa", "dev", "del", name], check=True, timeout=30)
    if (BUS / "drivers_autoprobe").exists():
        assert (BUS / "drivers_autoprobe").read_text().strip() == "1"


def test_a_kernel_without_vdpa_says_so_with_code_8(lab_kernel: str) -> None:
    if BUS.exists():
        pytest.skip("this kernel has vDPA")
    subprocess.run(["modprobe", "-r", "vdpa"], check=False)
    for command in ("parents", "list"):
        error = vfiotool("vdpa", command, code=8)["error"]
        assert error["kind"] == "unsupported"
        assert "CONFIG_VDPA" in error["hint"]


def test_debians_modules_bring_a_parent() -> None:
    if subprocess.run(["modprobe", "vduse"], check=False).returncode:
        pytest.skip("this kernel has no vduse")
    found = {parent["name"]: parent for parent in vfiotool("vdpa", "parents")["parents"]}
    assert found["vduse"]["classes"] == ["net", "block"] or found["vduse"]["classes"] == ["block"]
    assert sorted(found) == sorted(iproute2("mgmtdev", "show")["mgmtdev"])


@SIMULATED
def test_parents_are_those_of_iproute2() -> None:
    theirs = iproute2("mgmtdev", "show")["mgmtdev"]
    ours = {parent["name"]: parent for parent in vfiotool("vdpa", "parents")["parents"]}
    assert sorted(ours) == sorted(theirs)
    for name, parent in ours.items():
        assert parent["classes"] == theirs[name]["supported_classes"]
        assert parent["max_vqs"] == theirs[name]["max_supported_vqs"]
        assert parent["features"] == theirs[name]["dev_features"]


@SIMULATED
def test_devices_and_their_configuration_are_those_of_iproute2() -> None:
    vfiotool("vdpa", "add", "n0", "vdpasim_net", "--mac", MAC, "--mtu", "1400")
    vfiotool("vdpa", "add", "b0", "vdpasim_blk")
    ours = {device["name"]: device for device in vfiotool("vdpa", "list")["vdpas"]}
    theirs = iproute2("dev", "show")["dev"]
    config = stripped(iproute2("dev", "config", "show")["config"])
    assert sorted(ours) == sorted(theirs) == ["b0", "n0"]
    kinds = {"network": "net", "block": "block"}
    for name, device in theirs.items():
        assert ours[name]["type"] == kinds[device["type"]]
        assert ours[name]["parent"] == device["mgmtdev"]
        assert int(ours[name]["vendor"], 16) == device["vendor_id"]
        assert ours[name]["max_vqs"] == device["max_vqs"]
        assert ours[name]["max_vq_size"] == device["max_vq_size"]
    network = dict(config["n0"])
    assert ours["n0"]["negotiated_features"] == network.pop("negotiated_features")
    assert ours["n0"]["config"] == network
    assert network["mac"] == MAC and network["mtu"] == 1400
    # iproute2 6.1 prints nothing of a disk: the host's own disk is the witness.
    [disk] = ours["b0"]["interfaces"]
    sectors = int(Path(f"/sys/class/block/{disk}/size").read_text())
    assert ours["b0"]["config"]["capacity_sectors"] == sectors
    queue = Path(f"/sys/class/block/{disk}/queue")
    logical = int((queue / "logical_block_size").read_text())
    assert ours["b0"]["config"]["block_size_bytes"] == logical
    assert "FLUSH" in ours["b0"]["features"]


@SIMULATED
def test_add_for_a_vm_never_shows_the_disk_to_the_host() -> None:
    before = sorted(os.listdir("/sys/class/block"))
    done = vfiotool("vdpa", "add", "v0", "vdpasim_blk", "--driver", "vhost_vdpa")
    [device] = done["vdpas"]
    assert device["driver"] == device["driver_override"] == "vhost_vdpa"
    assert device["node"] and Path(device["node"]).is_char_device()
    assert sorted(os.listdir("/sys/class/block")) == before
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    assert not any("virtio_blk" in line and "v0" in line for line in log.splitlines())
    again = vfiotool("vdpa", "add", "v0", "vdpasim_blk", "--driver", "vhost_vdpa")
    assert again["steps"] == []


@SIMULATED
def test_bind_moves_a_device_between_vm_and_host_and_back() -> None:
    vfiotool("vdpa", "add", "b0", "vdpasim_blk")
    [device] = vfiotool("vdpa", "bind", "b0", "vhost_vdpa")["vdpas"]
    assert device["node"] and device["interfaces"] == []
    [device] = vfiotool("vdpa", "bind", "b0", "virtio-vdpa")["vdpas"]
    assert device["driver"] == "virtio_vdpa" and device["node"] is None
    assert len(device["interfaces"]) == 1
    assert vfiotool("vdpa", "bind", "b0", "virtio_vdpa")["steps"] == []


@SIMULATED
def test_a_mounted_disk_and_an_open_node_are_refused() -> None:
    vfiotool("vdpa", "add", "b0", "vdpasim_blk")
    [disk] = vfiotool("vdpa", "list")["vdpas"][0]["interfaces"]
    subprocess.run(["mkfs.ext4", "-q", f"/dev/{disk}"], check=True, timeout=120)
    point = Path("/tmp/vdpa-mount")
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", f"/dev/{disk}", str(point)], check=True)
    try:
        for command in (("remove", "b0"), ("bind", "b0", "vhost_vdpa")):
            error = vfiotool("vdpa", *command, code=4)["error"]
            assert str(point) in error["message"]
        assert names() == ["b0"]
    finally:
        subprocess.run(["umount", str(point)], check=True)
    [device] = vfiotool("vdpa", "bind", "b0", "vhost_vdpa")["vdpas"]
    with open(device["node"], "rb") as node:
        # Another process: what this one has open itself is no reason to refuse.
        holder = subprocess.Popen(["sleep", "600"], stdin=node)
    try:
        error = vfiotool("vdpa", "remove", "b0", code=4)["error"]
        assert device["node"] in error["message"] and str(holder.pid) in error["message"]
    finally:
        holder.kill()
        holder.wait()
    vfiotool("vdpa", "remove", "b0")
    assert names() == []


@SIMULATED
def test_undo_of_a_removal_makes_the_device_again_as_it_was() -> None:
    settings = ("--mac", MAC, "--mtu", "1300", "--driver", "vhost_vdpa")
    [before] = vfiotool("vdpa", "add", "n0", "vdpasim_net", *settings)["vdpas"]
    vfiotool("vdpa", "remove", "n0")
    assert names() == []
    vfiotool("undo")
    [after] = vfiotool("vdpa", "list")["vdpas"]
    for key in ("parent", "type", "driver", "driver_override", "features"):
        assert after[key] == before[key]
    assert after["config"]["mac"] == MAC and after["config"]["mtu"] == 1300


@SIMULATED
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("add", "x0", "nowhere"), 3, "vdpasim_net"),
        (("add", "../x", "vdpasim_net"), 2, "name"),
        (("add", "x" * 300, "vdpasim_net"), 2, "name"),
        (("add", "x0", "../../x"), 2, "parent"),
        (("add", "x0", "vdpasim_blk", "--mac", MAC), 8, "mac"),
        (("add", "x0", "vdpasim_net", "--mac", "52:54"), 2, "MAC"),
        (("add", "x0", "vdpasim_net", "--mtu", "70000"), 2, "mtu"),
        (("add", "x0", "vdpasim_net", "--driver", "nvme"), 2, "driver"),
        (("add", "x0", "vdpasim_net", "--max-vqp", "9"), 5, "not supported"),
        (("remove", "x0"), 3, "x0"),
        (("bind", "x0", "vhost_vdpa"), 3, "x0"),
    ],
)
def test_refusals_have_their_code_and_leave_nothing_behind(
    arguments: tuple[str, ...], code: int, text: str
) -> None:
    error = vfiotool("vdpa", *arguments, code=code)["error"]
    assert text in error["message"]
    assert names() == []


@SIMULATED
def test_a_dry_run_prints_the_steps_and_touches_nothing() -> None:
    done = vfiotool("vdpa", "add", "d0", "vdpasim_net", "--driver", "vhost_vdpa", "--dry-run")
    assert [step["verb"] for step in done["steps"]] == [
        "set-vdpa-autoprobe",
        "set-vdpa",
        "bind-driver",
        "set-vdpa-autoprobe",
    ]
    assert names() == []


@SIMULATED
def test_a_device_that_vanishes_while_it_is_read_does_not_break_the_list() -> None:
    loop = "while :; do vdpa dev add name t0 mgmtdev vdpasim_net; vdpa dev del t0; done 2>/dev/null"
    churn = subprocess.Popen(["sh", "-c", loop], start_new_session=True)
    try:
        deadline = time.monotonic() + 8
        seen = set()
        while time.monotonic() < deadline:
            seen.add(tuple(device["name"] for device in vfiotool("vdpa", "list")["vdpas"]))
        assert seen <= {(), ("t0",)}
    finally:
        os.killpg(churn.pid, 9)
        churn.wait()


@SIMULATED
def test_the_mac_address_is_set_and_undone() -> None:
    vfiotool("vdpa", "add", "n0", "vdpasim_net", "--mac", MAC, "--driver", "vhost_vdpa")
    other = "52:54:00:65:43:21"
    done = vfiotool("vdpa", "set", "n0", "--mac", other)
    assert [step["verb"] for step in done["steps"]] == ["set-vdpa-mac"]
    assert stripped(iproute2("dev", "config", "show", "n0")["config"])["n0"]["mac"] == other
    assert vfiotool("vdpa", "set", "n0", "--mac", other)["steps"] == []
    vfiotool("undo")
    assert stripped(iproute2("dev", "config", "show", "n0")["config"])["n0"]["mac"] == MAC
    vfiotool("vdpa", "add", "b0", "vdpasim_blk")
    assert vfiotool("vdpa", "set", "b0", "--mac", other, code=8)["error"]["kind"] == "unsupported"


@SIMULATED
def test_statistics_are_those_of_iproute2() -> None:
    vfiotool("vdpa", "add", "n0", "vdpasim_net", "--mac", MAC, "--driver", "virtio_vdpa")
    queues = vfiotool("vdpa", "stats", "n0")["queues"]
    assert [item["queue"] for item in queues][:2] == [0, 1]
    theirs = str(iproute2("dev", "vstats", "show", "n0", "qidx", "0"))
    for name in queues[0]["counters"]:
        assert name in theirs
    vfiotool("vdpa", "add", "b0", "vdpasim_blk")
    assert vfiotool("vdpa", "stats", "b0", code=8)["error"]["kind"] == "unsupported"


@SIMULATED
def test_statistics_of_a_device_without_a_driver_say_why_in_the_kernels_words() -> None:
    vfiotool("vdpa", "add", "n0", "vdpasim_net", "--driver", "vhost_vdpa")
    error = vfiotool("vdpa", "stats", "n0", code=5)["error"]
    assert "feature negotiation not complete" in error["message"]
