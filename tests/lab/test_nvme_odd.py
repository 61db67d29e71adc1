"""The NVMe driver on controllers and namespaces that are odd, and beside nvme-cli.

Metadata, protection information, 4 KiB blocks with a small MDTS and few queue entries, no
namespace at all, zones, few queues and vectors, disks that fail: QEMU has each of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.placed import placed
from tests.lab.commands import vfiotool
from tests.lab.nvme_guest import bind_nvme, to_vfio
from tests.lab.vfio_guest import BACKENDS, PCI
from vfiotool.drivers.nvme import Controller, admin, blocks
from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.pointers import Segment
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.vfio import Device

MACHINE = "odd-nvme"
KERNELS = ("6.1", "6.12", "iommufd")
META, LARGE, NONE, ZONED, FEW, SLOW, BAD = (f"0000:0{number}:00.0" for number in range(1, 8))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def controller(request: pytest.FixtureRequest, backend: str) -> Iterator[Controller]:
    """The controller of the address that the test is parametrized with."""
    with Device.open(to_vfio(request.param), backend=backend) as device:
        yield Controller(device)


def on(address: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("controller", [address], indirect=True)


def identified(address: str) -> dict[str, Any]:
    ran = vfiotool("nvme", "identify", to_vfio(address), "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = ran.json
    return found


def test_odd_namespaces_are_told_as_what_they_are(tmp_path: Path) -> None:
    first, second, third = identified(META)["namespaces"]
    assert (first["metadata_bytes"], second["metadata_bytes"]) == (8, 0)
    assert "carry 8 bytes of metadata" in first["problem"] and second["problem"] is None
    assert third["metadata_bytes"] == 8
    assert identified(NONE)["namespaces"] == []
    zoned, beside = identified(ZONED)["namespaces"]
    assert (zoned["command_set"], beside["command_set"]) == ("zoned", "nvm")
    (large,) = identified(LARGE)["namespaces"]
    assert (large["block_bytes"], identified(LARGE)["max_transfer_bytes"]) == (4096, 8192)
    few = identified(FEW)
    assert [one["nsid"] for one in few["namespaces"]] == [1, 2] and few["queue_pairs"] == 2
    # And none of them is read as what it is not.
    for address, nsid, code in ((META, "1", 8), (NONE, "1", 2), (FEW, "3", 2)):
        ran = vfiotool("nvme", "read", address, "--nsid", nsid, "--output", str(tmp_path / "x"))
        assert ran.code == code, (address, nsid, ran)
        assert "Traceback" not in ran.err


@on(META)
def test_metadata_moves_with_its_blocks(controller: Controller) -> None:
    disk, queue = controller.namespace(1), controller.create_queue()
    assert disk.metadata_bytes == 8 and not disk.extended
    with pytest.raises(Unsupported):
        queue.read(disk, 0, 1)
    alloc = controller.device.dma.alloc
    with alloc(8 * 512) as data, alloc(4096) as metadata:
        content, tags = placed(disk, 40, 8, 1), os.urandom(64)
        data.view[: 8 * 512], metadata.view[:64] = content, tags
        segments, meta = [Segment(data, 0, 8 * 512)], Segment(metadata, 0, 64)
        blocks.transfer(queue, nvme_spec.WRITE, disk, 40, 8, segments, metadata=meta)
        data.view[: 8 * 512], metadata.view[:64] = bytes(8 * 512), bytes(64)
        blocks.transfer(queue, nvme_spec.READ, disk, 40, 8, segments, metadata=meta)
        assert bytes(data.view[: 8 * 512]) == content and bytes(metadata.view[:64]) == tags
        with pytest.raises(UsageError, match="give a buffer"):
            blocks.transfer(queue, nvme_spec.READ, disk, 40, 8, segments)
    # The namespace beside it is none the wiser.
    plain = controller.namespace(2)
    queue.write(plain, 40, placed(plain, 40, 8, 2))
    assert queue.read(plain, 40, 8) == placed(plain, 40, 8, 2)


@on(META)
def test_protection_information_is_made_and_checked(controller: Controller) -> None:
    disk, queue = controller.namespace(3), controller.create_queue()
    assert disk.protection == 1
    alloc = controller.device.dma.alloc
    act, check = nvme_spec.PRACT, 0x7 << 10  # PRCHK: guard, application and reference tag
    with alloc(4 * 512) as data, alloc(4096) as metadata:
        data.view[: 4 * 512] = content = placed(disk, 96, 4, 3)
        segments, meta = [Segment(data, 0, 4 * 512)], Segment(metadata, 0, 32)
        # PRACT has the controller make it; it is checked when it is read, here and there.
        blocks.transfer(queue, nvme_spec.WRITE, disk, 96, 4, segments, control=act)
        data.view[: 4 * 512] = bytes(4 * 512)
        blocks.transfer(queue, nvme_spec.READ, disk, 96, 4, segments, metadata=meta, control=check)
        assert bytes(data.view[: 4 * 512]) == content
        tags = [int.from_bytes(metadata.view[8 * n + 4 : 8 * n + 8], "big") for n in range(4)]
        assert tags == [96, 97, 98, 99]
        # Type 1: the reference tag is the block's number (5.2.1.3).
        with pytest.raises(KernelError, match="invalid protection information"):
            blocks.transfer(
                queue, nvme_spec.READ, disk, 96, 4, segments,
                metadata=meta, control=check, reference=500,
            )  # fmt: skip


@on(LARGE)
def test_large_blocks_and_a_small_transfer_size(controller: Controller) -> None:
    disk = controller.namespace(1)
    with pytest.raises(UsageError, match="2 to 32 entries"):
        controller.create_queue(64)
    queue = controller.create_queue()
    assert (queue.depth, controller.max_transfer, disk.block_bytes) == (31, 8192, 4096)
    for lba, count in ((0, 1), (1, 2), (5, 37), (disk.blocks - 64, 64)):
        queue.write(disk, lba, placed(disk, lba, count, 7))
        assert queue.read(disk, lba, count) == placed(disk, lba, count, 7)
    with pytest.raises(UsageError, match="the controller takes 8192"):
        queue.send(nvme_spec.READ, disk, 0, 3, controller.device.dma.alloc(3 * 4096))
    with pytest.raises(UsageError, match="not whole blocks"):
        queue.write(disk, 0, bytes(512))


@on(ZONED)
def test_zones_are_written_in_order_and_reported(controller: Controller) -> None:
    disk, queue = controller.namespace(1), controller.create_queue()
    blocks.zone_action(queue, disk, "reset", every=True)
    zones = blocks.report_zones(queue, disk)
    size = zones[1].start
    assert len(zones) == 32 and {zone.state for zone in zones} == {"empty"}
    queue.write(disk, 0, placed(disk, 0, 4, 1))
    assert blocks.zone_append(queue, disk, 0, placed(disk, 4, 2, 1)) == 4
    assert queue.read(disk, 0, 6) == placed(disk, 0, 6, 1)
    first = blocks.report_zones(queue, disk, limit=1)[0]
    assert (first.write_pointer, first.state) == (6, "implicitly-open")
    for lba, words in ((0, "zone invalid write"), (size + 5, "zone invalid write")):
        with pytest.raises(KernelError, match=words):
            queue.write(disk, lba, placed(disk, lba, 1, 1))
    with pytest.raises(KernelError, match="zone boundary error"):
        queue.read(disk, size - 1, 2)
    blocks.zone_action(queue, disk, "finish", 0)
    with pytest.raises(KernelError, match="zone is full"):
        blocks.zone_append(queue, disk, 0, placed(disk, 0, 1, 1))
    for number in range(4):
        blocks.zone_action(queue, disk, "open", (number + 1) * size)
    with pytest.raises(KernelError, match=r"too many (active|open) zones"):
        queue.write(disk, 9 * size, placed(disk, 9 * size, 1, 1))
    beside = controller.namespace(2)
    with pytest.raises(UsageError, match="is not zoned"):
        blocks.report_zones(queue, beside)
    queue.write(beside, 77, placed(beside, 77, 3, 2))
    assert queue.read(beside, 77, 3) == placed(beside, 77, 3, 2)


@on(FEW)
def test_few_queues_vectors_and_a_detached_namespace(controller: Controller) -> None:
    controller.enable_interrupts(3)
    queues = [controller.create_queue(vector=vector) for vector in (1, 2)]
    with pytest.raises(UsageError, match="takes 2 queue pairs"):
        controller.create_queue()
    assert admin.allocated_namespaces(controller) == [1, 2, 3]
    assert controller.namespaces() == [1, 2]
    with pytest.raises(UsageError, match="namespace 3 is not active"):
        controller.namespace(3)
    admin.attach(controller, 3)
    assert controller.namespaces() == [1, 2, 3]
    # What is written to one namespace is that one's alone.
    disks = [controller.namespace(nsid) for nsid in (1, 2, 3)]
    for disk in disks:
        queues[disk.nsid % 2].write(disk, 9, placed(disk, 9, 4, disk.nsid))
    for disk in disks:
        assert queues[0].read(disk, 9, 4) == placed(disk, 9, 4, disk.nsid)
    admin.attach(controller, 3, detach=True)
    with pytest.raises(KernelError):
        queues[0].read(disks[2], 9, 1)
    assert controller.namespaces() == [1, 2]


@on(BAD)
def test_a_failing_block_is_named_and_the_others_arrive(controller: Controller) -> None:
    disk, queue = controller.namespace(1), controller.create_queue()
    queue.write(disk, 0, placed(disk, 0, 2048, 4))
    assert queue.read(disk, 0, 2000) == placed(disk, 0, 2000, 4)
    with pytest.raises(KernelError, match=r"read of blocks .* failed: unrecovered") as caught:
        queue.read(disk, 1000, 3000)
    first, last = map(int, re.findall(r"\d+", caught.value.message)[:2])
    assert first <= 2048 <= last < first + 256
    with pytest.raises(KernelError, match=r"write of blocks 40\d\d to 4\d+ failed: write fault"):
        queue.write(disk, 4000, placed(disk, 4000, 200, 4))
    assert queue.pair.in_flight == 0
    assert queue.read(disk, 0, 100) == placed(disk, 0, 100, 4)


def answers(*arguments: str) -> Any:
    ran = vfiotool("nvme", *arguments, "--json")
    assert ran.code == 0, (arguments, ran)
    return ran.json


def test_every_command_meets_a_controller(tmp_path: Path) -> None:
    """The commands of `vfiotool nvme` one by one, on the disk that the driver holds."""
    disk, zoned, file = to_vfio(FEW), to_vfio(ZONED), tmp_path / "blocks"
    file.write_bytes(bytes(range(256)) * 16)
    nsid = ("--nsid", "1")
    answers("write", disk, *nsid, "--lba", "64", "--input", str(file))
    told = answers("read", disk, *nsid, "--lba", "64", "--blocks", "8", "--output", str(file))
    assert told["blocks"] == 8 and file.read_bytes() == bytes(range(256)) * 16
    assert answers("id-ctrl", disk)["sn"] == "lab-odd5"
    assert answers("id-ns", disk)["nsze"] == 65536
    assert answers("list-ns", disk)["nsid_list"] == [1, 2]
    assert answers("list-ns", disk, "--all")["nsid_list"] == [1, 2, 3]
    assert answers("smart-log", disk)["temperature"] == 323
    assert answers("error-log", disk)["errors"] == []
    assert answers("fw-log", disk)["frs1"]
    # What an earlier test attached; reading the log empties it.
    assert set(answers("changed-ns-list-log", disk)["nsid_list"]) <= {3}
    assert answers("changed-ns-list-log", disk)["nsid_list"] == []
    assert "0x02" in answers("effects-log", disk)["io"]
    assert answers("get-feature", disk, "-f", "6")["value"] in (0, 1)
    answers("set-feature", disk, "-f", "6", "--value", "1")
    answers("attach-ns", disk, "--nsid", "3")
    assert answers("list-ns", disk)["nsid_list"] == [1, 2, 3]
    answers("detach-ns", disk, "--nsid", "3")
    answers("verify", disk, "--lba", "64", "--blocks", "8")
    answers("flush", disk)
    answers("compare", disk, "--lba", "64", "--input", str(file))
    answers("copy", disk, "--sdlba", "80", "--slbs", "64,70", "--blocks", "6,2", "--overwrite")
    answers("compare", disk, "--lba", "80", "--data", str(file))
    answers("write-zeroes", disk, "--lba", "64", "--blocks", "4", "--overwrite")
    ran = vfiotool("nvme", "compare", disk, "--lba", "64", "--input", str(file), "--json")
    assert ran.code == 5 and "compare failure" in ran.err + ran.out
    answers("dsm", disk, "--lba", "68", "--blocks", "4", "--overwrite")
    answers("read", disk, *nsid, "--lba", "64", "--blocks", "8", "--output", str(file))
    assert file.read_bytes()[:2048] == bytes(2048)
    answers("format", disk, "--nsid", "2", "--overwrite")
    zones = answers("report-zones", zoned, "--limit", "3")["zone_list"]
    assert [zone["slba"] for zone in zones] == [0, 2048, 4096]
    # QEMU has none of these: the controller's refusal is told, not a success.
    for words in (
        ("create-ns", disk, "--nsze", "128"),
        ("delete-ns", disk, "--nsid", "2", "--overwrite"),
        ("sanitize", disk, "--sanact", "2", "--overwrite"),
        ("sanitize-log", disk),
        ("fw-download", disk, "--fw", str(file), "--overwrite"),
    ):
        ran = vfiotool("nvme", *words, "--json")
        assert ran.code == 5 and "invalid" in ran.err + ran.out, (words, ran)
    # What destroys data asks for the word.
    for words in (
        ("format", disk),
        ("delete-ns", disk, "--nsid", "2"),
        ("sanitize", disk, "--sanact", "2"),
        ("copy", disk, "--sdlba", "80", "--slbs", "64"),
        ("dsm", disk),
        ("write-zeroes", disk),
        ("fw-download", disk, "--fw", str(file)),
    ):
        assert vfiotool("nvme", *words).code == 4, words


# Error recovery is a feature of a namespace.
NAMESPACE_OF = {5: "1"}


def nvme_cli(*arguments: str) -> Any:
    done = subprocess.run(
        ["nvme", *arguments, "-o", "json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (arguments, done)
    return json.loads(done.stdout)


def character_device(address: str) -> str:
    bind_nvme(address)
    (name,) = (entry.name for entry in (PCI / address / "nvme").glob("nvme*"))
    end = time.monotonic() + 30
    while not Path(f"/dev/{name}").is_char_device():
        assert time.monotonic() < end
        time.sleep(0.05)
    return f"/dev/{name}"


def same(ours: Any, theirs: Any, known: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Fields of both that differ; ours that they have under no name are not compared."""
    return {
        name: (ours[name], value)
        for name, value in theirs.items()
        if name in ours and name not in known and not alike(ours[name], value)
    }


def alike(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return not same(ours, theirs)
    if isinstance(theirs, list) and isinstance(ours, list):
        # nvme-cli lists what is not there, too.
        return all(alike(mine, other) for mine, other in zip(ours, theirs, strict=False))
    # Identifiers are told with and without dashes.
    return bool(ours == theirs) or plain(ours) == plain(theirs)


def plain(value: object) -> str:
    return str(value).strip().replace("-", "")


@pytest.mark.parametrize(("address", "nsids"), [(FEW, (1, 2)), (META, (1, 2, 3)), (LARGE, (1,))])
def test_identify_logs_and_features_are_as_nvme_cli_tells_them(
    address: str, nsids: tuple[int, ...]
) -> None:
    if shutil.which("nvme") is None:
        pytest.skip("no nvme-cli here")
    node = character_device(address)
    their_controller = nvme_cli("id-ctrl", node)
    their_namespaces = {n: nvme_cli("id-ns", node, "-n", str(n)) for n in nsids}
    their_smart = nvme_cli("smart-log", node)
    their_firmware = next(iter(nvme_cli("fw-log", node).values()))
    their_list = nvme_cli("list-ns", node)
    features = (1, 2, 4, 5, 6, 7, 8, 11)
    their_features = {}
    for number in features:
        words = [
            "nvme",
            "get-feature",
            node,
            "-f",
            str(number),
            "-n",
            NAMESPACE_OF.get(number, "0"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done
        their_features[number] = int(done.stdout.strip().rsplit(":", 1)[1], 0)
    to_vfio(address)
    ours = answers("id-ctrl", address)
    assert len(ours.keys() & their_controller.keys()) > 60
    assert same(ours, their_controller) == {}
    for nsid, theirs in their_namespaces.items():
        mine = answers("id-ns", address, "--nsid", str(nsid))
        assert len(mine.keys() & theirs.keys()) > 25
        assert same(mine, theirs) == {}
    # Counters go on between the two looks.
    counting = frozenset(
        {"host_read_commands", "host_write_commands", "data_units_read", "data_units_written"}
    )
    smart = answers("smart-log", address)
    assert len(smart.keys() & their_smart.keys()) > 12
    assert same(smart, their_smart, counting) == {}
    firmware = answers("fw-log", address)
    assert any(firmware["frs1"] in str(value) for value in their_firmware.values())
    listed = [one["nsid"] if isinstance(one, dict) else one for one in their_list["nsid_list"]]
    assert [one for one in listed if one] == answers("list-ns", address)["nsid_list"]
    changed = {7, 11}  # the kernel's driver asks for queues and events of its own
    with Device.open(address) as device:
        controller = Controller(device)
        for number, value in their_features.items():
            nsid = int(NAMESPACE_OF.get(number, "0"))
            mine, _ = admin.get_feature(controller, number, nsid=nsid)
            assert number in changed or mine == value, (number, mine, value)
