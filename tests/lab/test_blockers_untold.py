"""Uses of which the kernel tells half: a disk that nothing claims, an index without a namespace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lab.blockers_guest import blockers, disk_of, need, run
from tests.lab.commands import vfiotool
from tests.lab.test_blockers_unseen import DISK, configfs, folder, in_namespace, interface

MACHINE = "full"
KERNELS = ("6.1", "6.12")
PROOF = "modules of clusters and of taps: a minute"


@pytest.fixture
def clean() -> Iterator[ExitStack]:
    """Undoes what a test did, last first."""
    need("vfio-pci", "nvme")
    with ExitStack() as stack:
        yield stack


def test_a_disk_that_has_a_clusters_heartbeat_is_named(clean: ExitStack) -> None:
    """The kernel has it open without a claim, and no process has."""
    need("ocfs2_nodemanager")
    cluster = folder(clean, configfs() / "cluster/ours")
    node = folder(clean, cluster / "node/here")
    run("ip", "link", "set", "lo", "up")
    for attribute, value in (("ipv4_port", "7777"), ("ipv4_address", "127.0.0.1"), ("num", "1")):
        (node / attribute).write_text(value)
    (node / "local").write_text("1")
    clean.callback((node / "local").write_text, "0")
    region = folder(clean, cluster / f"heartbeat/{'AB' * 16}")
    for attribute, value in (("block_bytes", "512"), ("start_block", "1"), ("blocks", "16")):
        (region / attribute).write_text(value)
    with open(f"/dev/{disk_of(DISK)}", "r+b", buffering=0) as disk:
        (region / "dev").write_text(str(disk.fileno()))
    assert [entry["subject"] for entry in blockers(DISK, "storage-member")] == ["ours"]
    assert vfiotool("bind", DISK, "--dry-run").code == 4


def test_a_tap_of_a_container_is_found_by_its_cards_index_alone(clean: ExitStack) -> None:
    """The kernel does not tell in which namespace the index is."""
    address, name = interface()
    need("ipvtap")
    pid = in_namespace(clean)
    run("ip", "link", "set", name, "up")
    clean.callback(run, "ip", "link", "set", name, "down")
    run("ip", "link", "add", "link", name, "name", "upper0", "type", "ipvtap")
    run("ip", "link", "set", "upper0", "netns", pid)
    assert [entry["subject"] for entry in blockers(address, "bridge-or-bond")] == ["upper0"]
    assert vfiotool("bind", address, "--dry-run").code == 4
