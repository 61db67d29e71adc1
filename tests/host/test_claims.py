"""What other tools claim is read from files that anybody may have written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vfiotool.host.claims import claims


def laid_out(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "<hostdev " * 100_000,
        "<domain>" + "<hostdev><source>" * 40_000,
        "<domain>" + "<hostdev managed='yes'/>" * 40_000 + "</domain>",
        "<!DOCTYPE d [<!ENTITY a 'x'>]><domain>&a;</domain>",
    ],
)
def test_a_hostile_domain_costs_no_time_and_claims_nothing(tmp_path: Path, text: str) -> None:
    root = laid_out(tmp_path, "/etc/libvirt/qemu/a.xml", text)
    started = time.process_time()
    assert claims(root) == ""
    assert time.process_time() - started < 2


def test_an_mdevctl_file_nested_without_end_claims_nothing(tmp_path: Path) -> None:
    assert claims(laid_out(tmp_path, "/etc/mdevctl.d/0000:01:00.0/a", "[" * 100_000)) == ""


def test_the_source_of_a_host_device_is_not_its_place_in_the_guest(tmp_path: Path) -> None:
    text = (
        "<domain><devices><hostdev mode='subsystem' type='pci' managed='yes'><source>"
        "<address domain='0x0000' bus='0x03' slot='0x00' function='0x1'/></source>"
        "<address type='pci' domain='0x0000' bus='0x07' slot='0x00' function='0x0'/></hostdev>"
        "</devices></domain>"
    )
    root = laid_out(tmp_path, "/etc/libvirt/qemu/a.xml", text)
    assert claims(root).split("\t")[2:] == ["pci:0000:03:00.1", "domain a, managed\n"]


@pytest.mark.parametrize(
    "name",
    ["/etc/netplan/a.yaml", "/etc/libvirt/qemu/a.xml", "/etc/modprobe.d/a.conf"],
)
def test_a_fifo_among_the_files_does_not_block(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.lstrip("/")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert claims(str(tmp_path)) == ""
