"""The tree: every function once, in its place, on the terminal and as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.cli.reading import run
from vfiotool.cli.look.node import Node, summary_of
from vfiotool.cli.look.tree import build
from vfiotool.cli.look.tree_svg import draw
from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.names import Names
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.snapshot.load import open_root

HOSTS = Path(__file__).resolve().parents[3] / "fixtures" / "hosts"
NAMES = sorted(path.name for path in HOSTS.iterdir())
SVG = "{http://www.w3.org/2000/svg}"


def flat(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for node in nodes for found in (node, *flat(node["children"]))]


def tree_of(name: str) -> list[dict[str, Any]]:
    code, text = run(["tree"], str(HOSTS / name))
    assert code == 0
    roots: list[dict[str, Any]] = json.loads(text)["roots"]
    return roots


@pytest.mark.parametrize("name", NAMES)
def test_every_function_stands_in_the_tree_once(name: str) -> None:
    found = [
        node["address"]
        for node in flat(tree_of(name))
        if node["kind"] in ("endpoint", "bridge", "vf")
    ]
    assert sorted(found) == sorted(list_addresses(open_root(str(HOSTS / name))))


def test_a_device_stands_below_the_bridges_that_lead_to_it() -> None:
    (root,) = tree_of("shared-group")
    by_address = {node["address"]: node for node in flat([root])}
    bridge = by_address["0000:01:00.0"]
    assert bridge["kind"] == "bridge"
    assert [child["address"] for child in bridge["children"]] == ["0000:02:01.0", "0000:02:02.0"]
    assert by_address["0000:00:14.0"]["children"] == [bridge]


def test_virtual_functions_stand_below_their_physical_function() -> None:
    by_address = {node["address"]: node for node in flat(tree_of("vfs-enabled"))}
    vfs = by_address["0000:01:00.0"]["children"]
    assert [(vf["kind"], vf["vf_index"]) for vf in vfs] == [("vf", 0), ("vf", 1)]


def test_mediated_devices_without_a_bus_have_their_parents_as_roots() -> None:
    roots = {root["address"]: root for root in tree_of("mdev-parents")}
    assert {"mtty", "mbochs"} <= set(roots)
    assert {node["kind"] for node in roots["mtty"]["children"]} == {"mdev"}


def test_a_domain_of_its_own_hangs_where_its_bridge_is() -> None:
    by_address = {node["address"]: node for node in flat(tree_of("wide-domain"))}
    assert by_address["0000:00:14.0"]["children"] == [by_address["10000:e1:00.0"]]


def test_the_terminal_shows_groups_drivers_and_vfs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(HOSTS / "vfs-enabled"), "tree"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"01:00\.0 +group \d+ +blocked +nvme +nvme0n1, serial lab-nvme-0", text)
    assert re.search(r"VF 1 +01:00\.2 +group \d+ +available +no driver", text)
    assert re.search(r"VF 0 +02:10\.0 .*available +igbvf +eth1", text)
    assert "\x1b" not in text


def test_markup_in_a_name_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(HOSTS / "hostile-names"), "tree"])
    assert "[red]x[/red]" in capsys.readouterr().out


def many_vfs() -> list[Node]:
    files: dict[str, bytes | int] = {}
    links = {}
    pf = "/sys/devices/pci0000:00/0000:00:02.0/0000:05:00.0"
    for path in (pf.rpartition("/")[0], pf):
        files[f"{path}/uevent"] = b"DRIVER=ice\nPCI_ID=8086:1592\nPCI_CLASS=20000\n"
        links[f"/sys/bus/pci/devices/{path.rpartition('/')[2]}"] = f"../../..{path[4:]}"
    for index in range(64):
        address = f"0000:05:{index // 8 + 1:02x}.{index % 8}"
        path = f"{pf.rpartition('/')[0]}/{address}"
        driver = b"DRIVER=vfio-pci\n" if index < 60 else b""
        files[f"{path}/uevent"] = driver + b"PCI_ID=8086:1889\nPCI_CLASS=20000\n"
        links[f"{path}/physfn"] = "../0000:05:00.0"
        links[f"{pf}/virtfn{index}"] = f"../{address}"
        links[f"/sys/bus/pci/devices/{address}"] = f"../../..{path[4:]}"
        links[f"{path}/iommu_group"] = f"../../../../kernel/iommu_groups/{40 + index}"
    host = Host(MemoryTree(files, links), live=False, name="many")
    return build(host, read_inventory(host), Names(None))


def test_many_vfs_are_told_in_one_line() -> None:
    (root,) = many_vfs()
    vfs = root.children[0].children[0].children
    assert summary_of(vfs) == "64 VFs: 60 × vfio-pci, 4 × no driver; groups 40–103"
    picture = draw([root])
    assert "64 VFs" in picture and picture.count("<text") < 30


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_well_formed_and_names_every_device(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.svg"
    assert main(["--root", str(HOSTS / name), "tree", "--svg", str(file)]) == 0
    document = ElementTree.parse(file).getroot()
    assert document.tag == f"{SVG}svg"
    title, desc = (document.findtext(f"{SVG}{name}") for name in ("title", "desc"))
    assert title == "PCI devices and IOMMU groups" and "PCI functions" in (desc or "")
    texts = [element.text or "" for element in document.iter(f"{SVG}text")]
    for node in flat(tree_of(name)):
        short = node["address"].removeprefix("0000:")
        assert any(text.endswith(short) for text in texts), short
    assert not list(document.iter(f"{SVG}script"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_picture_lies_outside_of_it_or_overlaps(name: str) -> None:
    host = open_root(str(HOSTS / name))
    document = ElementTree.fromstring(draw(build(host, read_inventory(host), Names(None))))
    width, height = float(document.get("width", 0)), float(document.get("height", 0))
    cards = []
    for rect in document.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        if h == 46:
            cards.append((x, y, w, h))
    for number, (x, y, w, h) in enumerate(cards):
        for other_x, other_y, other_w, other_h in cards[number + 1 :]:
            assert (
                x + w <= other_x
                or other_x + other_w <= x
                or y + h <= other_y
                or other_y + other_h <= y
            )


def test_a_picture_that_cannot_be_written_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["--root", str(HOSTS / "no-iommu"), "tree", "--svg", "/nonexistent/tree.svg"])
    assert code == 2
    assert "cannot write" in capsys.readouterr().err
