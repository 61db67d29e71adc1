"""`groups`, `devices`, `show`, `why` as an operator runs them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.bighost import lay_out
from tests.fakes.config_space import build
from tests.fakes.memory_host import HostBuilder
from vfiotool.cli.look import groups as groups_module
from vfiotool.cli.look.devices import run_devices
from vfiotool.cli.look.groups import run_groups
from vfiotool.cli.look.roles import ROLES, STYLES
from vfiotool.cli.main import main
from vfiotool.devices.as_json import function_as_json
from vfiotool.devices.details import DetailReader
from vfiotool.devices.iommu import group_as_json, read_groups
from vfiotool.devices.names import Names
from vfiotool.devices.pci import list_addresses, read_functions
from vfiotool.errors import NotFound, Unsupported
from vfiotool.host.host import Host
from vfiotool.usage.standing import Standings

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "hosts"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
HOSTILE = "\x1b[2J\nfake: line\u202e"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("big") / "host"
    lay_out(root, 512)
    return root


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_the_groups_are_the_ones_that_iommu_reads(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vfiotool.snapshot.load import open_root

    host = open_root(str(FIXTURES / name))
    expected = [group_as_json(group) for group in read_groups(host)]
    if not expected:
        with pytest.raises(Unsupported):
            run_groups(host, [], as_json=True)
        return
    assert run_groups(host, [], as_json=True) == 0
    assert printed(capsys) == {"format_version": "1.0", "groups": expected}


def test_groups_of_a_big_host_are_whole_and_in_order(
    big: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host.at(str(big))
    assert run_groups(host, [], as_json=True) == 0
    found = printed(capsys)["groups"]
    assert found == [group_as_json(group) for group in read_groups(host)]
    assert sum(len(group["devices"]) for group in found) == 512


def test_devices_of_a_big_host_are_whole_and_in_order(
    big: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host.at(str(big))
    assert run_devices(host, [], as_json=True) == 0
    found = printed(capsys)["devices"]
    reader, standings = DetailReader(host), Standings(host)
    functions = read_functions(host, list_addresses(host))
    assert [item["address"] for item in found] == list_addresses(host)
    for item, function in list(zip(found, functions, strict=True))[::37]:
        wanted = function_as_json(function, reader.read(function), Names(None))
        wanted.update({key: item[key] for key in wanted if key.endswith("_name")})
        wanted.update(standings.of(function).as_json())
        assert item == json.loads(json.dumps(wanted))


def test_groups_by_id_and_an_unknown_id(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(big), "groups", "3", "1", "--json"]) == 0
    assert [group["id"] for group in printed(capsys)["groups"]] == [3, 1]
    assert main(["--root", str(big), "groups", "99999", "--json"]) == 3
    error = printed(capsys)["error"]
    assert error["kind"] == "not-found" and "99999" in error["message"]
    assert main(["--root", str(big), "groups", "twelve"]) == 2


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ((), "firmware offers the kernel no IOMMU"),
        (("DMAR",), "intel_iommu=on"),
        (("IVRS",), "amd_iommu=off"),
    ],
)
def test_a_host_without_groups_says_why_and_the_way_out(
    tables: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = HostBuilder().function("0000:01:00.0")
    for table in tables:
        builder.file(f"/sys/firmware/acpi/tables/{table}", "x")
    with pytest.raises(Unsupported) as caught:
        run_groups(builder.host(), [5], as_json=True)
    text = f"{caught.value.message} {caught.value.hint}"
    assert words in text and "vfiotool lab demo" in text
    assert caught.value.exit_code == 8


def test_devices_are_listed_without_any_iommu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(FIXTURES / "no-iommu"), "devices", "--json"]) == 0
    devices = printed(capsys)["devices"]
    assert devices and all(item["iommu_group"] is None for item in devices)


def hostile_host() -> HostBuilder:
    builder = HostBuilder()
    builder.function("0000:01:00.0", driver="evil\x1b[31m", group=1, attributes={"label": HOSTILE})
    vpd = b"\x82" + struct.pack("<H", 6) + b"\x1b[2Jab" + b"\x78"
    builder.file("/sys/devices/pci0000:00/0000:01:00.0/vpd", vpd)
    data = build([(0x03, bytes(6))])
    builder.file("/sys/devices/pci0000:00/0000:01:00.0/config", bytes(data))
    builder.file("/sys/bus/pci/slots/\x1b[5m/address", "0000:01:00\n")
    builder.file("/usr/share/misc/pci.ids", f"8086  Evil\x1b]0;title\x07\n\t10c9  {HOSTILE}\n")
    return builder


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_names_reach_the_terminal_as_escapes_only(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from vfiotool.cli.look.show import print_shown
    from vfiotool.devices.show import read_shown
    from vfiotool.usage.standing import Standings

    host = hostile_host().host()
    run_groups(host, [], as_json=as_json)
    run_devices(host, [], as_json=as_json)
    if not as_json:
        standing = Standings(host).named("0000:01:00.0")
        print_shown(read_shown(host, "0000:01:00.0"), standing)
    out = capsys.readouterr().out
    assert "evil" in out
    assert [char for char in out if not char.isprintable() and char != "\n"] == []
    assert not any(line.startswith("fake:") for line in out.splitlines())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfiotool", *arguments], capture_output=True, text=True, check=False
    )


def test_show_prints_everything_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "vfs-enabled")]
    assert main([*root, "show", "02:00.0"]) == 0
    text = capsys.readouterr().out
    for words in ("82576", "igb", "of 7 VFs", "PCI Express", "SR-IOV", "BAR 0", "reserved"):
        assert words in text
    assert main([*root, "show", "vf:02:00.0/1"]) == 0
    assert "VF 1 of 0000:02:00.0" in capsys.readouterr().out


def test_show_of_an_unknown_device_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "vfs-enabled"), "--json"]
    assert main([*root, "show", "0000:77:00.0"]) == 3
    assert printed(capsys)["error"]["kind"] == "not-found"


def test_why_answers_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "shared-group")]
    for address in ("0000:02:01.0", "0000:00:14.0"):
        code = main([*root, "--json", "why", address])
        verdict = printed(capsys)
        assert code == (0 if verdict["passable"] else 1)
        assert bool(verdict["blockers"]) != verdict["passable"]
        assert main([*root, "why", address]) == code
        assert address in capsys.readouterr().out


def test_a_mediated_device_is_shown_and_is_no_pci_function(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = ["--root", str(FIXTURES / "mdev-parents")]
    assert main([*root, "--json", "show", UUID]) == 0
    shown = printed(capsys)
    assert (shown["uuid"], shown["parent"], shown["type"]) == (UUID, "mtty", "mtty-2")
    assert main([*root, "--json", "devices", UUID]) == 3
    assert "show" in printed(capsys)["error"]["hint"]


def test_a_selector_of_devices_lists_all_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "twin-disks"), "--json"]
    assert main([*root, "devices"]) == 0
    everything = printed(capsys)["devices"]
    identity = next(
        f"{item['vendor']}:{item['device']}" for item in everything if item["class"] == "010802"
    )
    twins = [i["address"] for i in everything if f"{i['vendor']}:{i['device']}" == identity]
    assert main([*root, "devices", f"id:{identity}", twins[0]]) == 0
    assert [item["address"] for item in printed(capsys)["devices"]] == twins
    assert len(twins) > 1
    assert main([*root, "show", f"id:{identity}"]) == 3


def test_a_piped_listing_is_neither_cut_nor_padded() -> None:
    done = run("--root", str(FIXTURES / "vfs-enabled"), "devices")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert any(line.endswith("82576 Virtual Function") for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_every_role_has_words_for_people() -> None:
    assert set(ROLES) == set(STYLES) == {"vfio", "unbound", "bridge", "host", "mdev"}


def test_no_group_member_is_lost_when_a_group_vanishes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = HostBuilder().function("0000:01:00.0", group=1).host()
    with pytest.raises(NotFound):
        run_groups(host, [1, 2], as_json=True)
    assert [group.id for group in groups_module._read(host, [1, 2])] == [1]


def test_every_listing_has_the_verdict_that_why_gives(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "storage-in-use")]
    main([*root, "--json", "devices"])
    verdicts = {item["address"]: item["verdict"] for item in printed(capsys)["devices"]}
    bridges = set()
    for command in ("devices", "groups"):
        main([*root, command])
        for line in capsys.readouterr().out.splitlines():
            words = line.split()
            if words and words[0] in verdicts:
                if "-" in (words[2], words[3]) and verdicts[words[0]] not in words:
                    bridges.add(words[0])
                else:
                    assert verdicts[words[0]] in words, line
    assert all(name.startswith("0000:00:") for name in bridges)
    main([*root, "--json", "tree"])

    def walk(node: dict[str, Any]) -> None:
        if node["verdict"] is not None:
            assert node["verdict"] == verdicts[node["address"]]
        for child in node["children"]:
            walk(child)

    for node in printed(capsys)["roots"]:
        walk(node)


def test_interfaces_disks_and_serials_stand_where_one_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = ["--root", str(FIXTURES / "vfs-enabled")]
    main([*root, "devices"])
    text = capsys.readouterr().out
    assert "eth0" in text and "nvme0n1" in text and "lab-nvme-0" in text
    for command, words in (("groups", ["eth0", "nvme0n1"]), ("tree", ["eth0", "nvme0n1"])):
        main([*root, command])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), command


def test_devices_are_filtered_by_class_and_driver(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "vfs-enabled"), "--json", "devices"]
    main([*root, "class:nvme"])
    assert {item["class"] for item in printed(capsys)["devices"]} == {"010802"}
    main([*root, "driver:igbvf", "group:7"])
    found = printed(capsys)["devices"]
    assert {item["driver"] for item in found} == {"igbvf", "igb"}


def test_groups_are_found_by_their_devices(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(FIXTURES / "vfs-enabled"), "--json"]
    assert main([*root, "groups", "net:eth0", "02:00.0", "10"]) == 0
    assert [group["id"] for group in printed(capsys)["groups"]] == [7, 10]
    assert main(["--root", str(FIXTURES / "no-iommu"), "groups", "00:00.0"]) == 3
