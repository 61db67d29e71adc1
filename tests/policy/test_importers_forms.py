"""The forms in which people keep these settings, each from the field: carried over or named."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.cli.main import main
from vfiotool.errors import UsageError
from vfiotool.policy.importers import Import, import_files
from vfiotool.policy.importers.yaml_subset import parse_yaml
from vfiotool.policy.parse import parse_policy

FIELD = Path(__file__).resolve().parents[2] / "fixtures/field"
UUIDS = ("c7a3c5a4-1111-2222-3333-444455556666", "783e6dbb-ea0e-411f-94e2-717eaad438bf")


def run(name: str, text: str, kind: str | None = None) -> Import:
    return import_files(name, {name: text}, kind)


def field(number: str, name: str) -> Import:
    (folder,) = FIELD.glob(f"{number}-*")
    return run(name, (folder / name).read_text())


def rules(done: Import) -> dict[str, Any]:
    parse_policy(done.policy, "imported")
    parsed = tomllib.loads(done.policy)
    del parsed["version"]
    return parsed


def left(done: Import) -> str:
    return "\n".join(f"{item.where}: {item.what}: {item.why}" for item in done.leftovers)


def ids(done: Import) -> list[str]:
    return [rule["match"]["id"] for rule in rules(done).get("device", [])]


# Boot loaders


def test_a_loader_entry_gives_its_options_and_names_its_other_lines() -> None:
    done = field("32", "arch.conf")
    assert done.kind == "loader-entry"
    assert ids(done) == ["10de:25a0", "10de:2291"]
    assert [item.where for item in done.leftovers] == [f"arch.conf:{n}" for n in (1, 2, 3, 4, 4)]


def test_of_grubs_two_variables_the_default_one_comes_last_wherever_it_stands() -> None:
    done = run(
        "grub",
        'GRUB_CMDLINE_LINUX_DEFAULT="quiet vfio-pci.ids=10de:2684"\n'
        'GRUB_CMDLINE_LINUX="vfio-pci.ids=10de:1111"\nGRUB_TIMEOUT=5\n',
    )
    assert ids(done) == ["10de:2684"]
    assert "grub:2: vfio-pci.ids=10de:1111: grub:1 sets ids again, and counts" in left(done)
    assert "1 other line" in left(done)


def test_a_variable_of_grubs_that_is_set_again_counts_unless_it_is_added_to() -> None:
    first = 'GRUB_CMDLINE_LINUX="vfio-pci.ids=10de:1111"\n'
    done = run("grub", first + "GRUB_CMDLINE_LINUX='vfio-pci.ids=10de:2222'\n")
    assert ids(done) == ["10de:2222"]
    assert "grub:1: GRUB_CMDLINE_LINUX: grub:2 sets it again" in left(done)
    for more in ('GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX quiet"', 'GRUB_CMDLINE_LINUX+=" quiet"'):
        assert ids(run("grub", f"{first}{more}\n")) == ["10de:1111"]


def test_of_refinds_entries_the_first_counts_and_the_others_are_named() -> None:
    done = run(
        "refind_linux.conf",
        '"Boot"  "root=/dev/sda1 vfio-pci.ids=10de:2684"\n"Rescue" "root=/dev/sda1 single"\n',
    )
    assert (done.kind, ids(done)) == ("refind", ["10de:2684"])
    assert "refind_linux.conf:2" in left(done)
    done = run(
        "refind.conf", 'menuentry "Arch" {\n  loader /vmlinuz\n  options "vfio-pci.ids=1:2"\n}'
    )
    assert "not vendor:device" in left(done) or ids(done) == ["0001:0002"]
    assert "loader /vmlinuz" in left(done)


def test_kernelstub_keeps_what_the_user_set() -> None:
    done = run(
        "configuration",
        '{"default": {"kernel_options": ["quiet"]},'
        ' "user": {"kernel_options": ["splash", "vfio-pci.ids=10de:2684,10de:22ba"]}}',
    )
    assert (done.kind, ids(done)) == ("kernelstub", ["10de:2684", "10de:22ba"])
    assert "the user's own options count" in left(done)
    assert ids(run("c", '{"default": {"kernel_options": "vfio-pci.ids=10de:2684"}}')) == [
        "10de:2684"
    ]


def test_no_line_of_a_nix_module_is_lost() -> None:
    done = field("34", "vfio.nix")
    assert (done.kind, ids(done)) == ("nix", ["10de:2204", "10de:1aef"])
    assert 'vfio.nix:4: { id = "10de:1c02" }: the kernel\'s command line sets ids' in left(done)
    assert '{ id = "10de:10f1" }' in left(done)


def test_nix_options_alone_over_several_lines_are_carried_over() -> None:
    text = (
        '{\n  boot.initrd.kernelModules = [ "vfio_pci" ];\n'
        "  boot.extraModprobeConfig = ''\n    options vfio-pci ids=10de:1c02 disable_vga=1\n"
        "    softdep nvidia pre: vfio-pci\n  '';\n"
        '  # boot.kernelParams = [ "vfio-pci.ids=1:1" ];\n}'
    )
    done = run("vfio.nix", text)
    assert ids(done) == ["10de:1c02"]
    for said in ("vfio.nix:2: boot.initrd.kernelModules", "vfio.nix:4: disable_vga=1", "nix:5:"):
        assert said in left(done)


# Virtual machines


def test_proxmox_driver_keep_is_no_rule_and_is_named() -> None:
    done = field("36", "108.conf")
    assert [rule["match"]["address"] for rule in rules(done)["device"]] == [
        "0000:01:00.0",
        "0000:02:00.1",
    ]
    assert "108.conf:1: 41:00.4: driver=keep" in left(done)


def test_an_nvme_disk_of_a_domain_is_a_device_and_the_rest_is_named() -> None:
    done = field("38", "domain.xml")
    found = {rule["match"]["address"]: rule["driver"] for rule in rules(done)["device"]}
    assert found["0000:04:00.0"] == "vfio-pci"
    assert found["0000:65:00.2"] == "mlx5_vfio_pci"
    for said in (
        "managed='yes' of 0000:04:00.0",
        "iommufd='yes' of 0000:01:00.0",
        "<zpci> of 0001:00:00.0",
        "sriov-pool",
        "namespace 1 of 0000:04:00.0",
    ):
        assert said in left(done)


def test_several_node_devices_after_each_other_are_all_read() -> None:
    one = (
        "<?xml version='1.0'?><device><name>pci_{n}</name><capability type='pci'><domain>0</domain>"
        "<bus>{n}</bus><slot>0</slot><function>0</function></capability>"
        "<driver><name>vfio-pci</name></driver></device>\n"
    )
    done = run("nodes.xml", one.format(n=1) + one.format(n=2))
    assert [rule["match"]["address"] for rule in rules(done)["device"]] == [
        "0000:01:00.0",
        "0000:02:00.0",
    ]
    with pytest.raises(UsageError, match=r"refused|not well-formed"):
        run("nodes.xml", "<device/><!DOCTYPE d [<!ENTITY a 'b'>]><device>&a;</device>", "libvirt")


# mdevctl


def test_mdevctls_dump_gives_the_devices_of_all_parents_with_their_attributes_in_order() -> None:
    done = field("39", "dump.json")
    first, second = rules(done)["mdev"]
    assert (first["parent"], first["uuid"]) == ("0000:00:02.0", UUIDS[0])
    assert (second["parent"], second["uuid"]) == ("matrix", UUIDS[1])
    assert [name for name, _ in second["attrs"]] == [
        "assign_adapter",
        "assign_adapter",
        "assign_domain",
        "assign_control_domain",
    ]
    assert "started by hand" in left(done)


def test_a_definition_alone_says_that_its_uuid_is_missing() -> None:
    done = field("39", "vfio-ap.json")
    assert rules(done) == {}
    assert "without its UUID, which is the name of its file" in left(done)


@pytest.mark.parametrize(
    "text", ['["mdev_type"]', '[{"p": 3}]', '[{"p": [{"u": {"mdev_type": "t"}}]}]', '[{"mdev_type"']
)
def test_a_dump_of_another_shape_is_named_and_breaks_nothing(text: str) -> None:
    done = run("dump.json", text, "mdevctl")
    assert rules(done) == {}
    assert done.leftovers


def test_a_dump_whose_names_lead_elsewhere_is_refused() -> None:
    with pytest.raises(UsageError, match="could lead out"):
        run("d.json", json.dumps([{"../x": [{UUIDS[0]: {"mdev_type": "t"}}]}]), "mdevctl")


# VF settings


@pytest.mark.parametrize(
    ("name", "kind", "address", "count"),
    [
        ("sysfs.conf", "sysfs", "0000:00:02.0", 7),
        ("tmpfiles-sriov.conf", "tmpfiles", "0000:3b:00.0", 8),
        ("10-vfio.rules", "udev", "0000:01:00.0", 4),
    ],
)
def test_attributes_that_files_write_at_boot_become_rules(
    name: str, kind: str, address: str, count: int
) -> None:
    done = field("42", name)
    assert done.kind == kind
    assert rules(done)["sriov"] == [{"match": {"address": address}, "vfs": count}]
    assert done.leftovers == ()


def test_a_udev_rule_that_sets_an_override_is_a_device_rule() -> None:
    done = field("42", "10-vfio.rules")
    assert rules(done)["device"] == [{"match": {"address": "0000:02:00.0"}, "driver": "vfio-pci"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('ACTION=="add", DRIVERS=="igb", ATTR{sriov_numvfs}="4"', "DRIVERS==igb"),
        ('KERNEL=="0000:01:00.0", ENV{X}!="1", ATTR{sriov_numvfs}="4"', "ENV{X}!="),
        ('KERNEL=="0000:01:00.0", ATTR{power/control}="on"', "a policy does not set"),
        ('KERNEL=="0000:01:00.0", RUN+="/bin/true"', "sets no attribute"),
        ('ATTR{vendor}=="0x10de", ATTR{driver_override}="vfio-pci"', "half an id"),
    ],
)
def test_a_udev_rule_is_never_widened(line: str, said: str) -> None:
    done = run("x.rules", line)
    assert (done.kind, rules(done)) == ("udev", {})
    assert said in left(done)


def test_udev_rules_match_by_id_and_by_interface_over_continued_lines() -> None:
    done = run(
        "x.rules",
        'SUBSYSTEM=="pci", ATTR{vendor}=="0x10de", \\\n  ATTR{device}=="0x2684", '
        'ATTR{driver_override}="vfio_pci"\n'
        'ACTION=="add", SUBSYSTEM=="net", KERNEL=="enp1s0", ATTR{device/sriov_numvfs}="4"\n',
    )
    assert rules(done)["device"] == [{"match": {"id": "10de:2684"}, "driver": "vfio-pci"}]
    assert rules(done)["sriov"] == [{"match": {"net": "enp1s0"}, "vfs": 4}]


def test_other_lines_of_such_files_are_named() -> None:
    done = run(
        "sysfs.conf", "mode class/x = 644\nclass/net/eth0/device/sriov_numvfs = 2\nbus/y = 1\n"
    )
    assert rules(done)["sriov"] == [{"match": {"net": "eth0"}, "vfs": 2}]
    assert [item.where for item in done.leftovers] == ["sysfs.conf:1", "sysfs.conf:3"]
    done = run("x.conf", "d /run/x 0755 root root -\nw /sys/kernel/x - - - - 1\n", "tmpfiles")
    assert [item.where for item in done.leftovers] == ["x.conf:1", "x.conf:2"]


def test_netplan_counts_the_definitions_that_link_to_an_interface() -> None:
    done = field("42", "01-sriov.yaml")
    assert rules(done)["sriov"] == [{"match": {"net": "engreen"}, "vfs": 1, "eswitch": "switchdev"}]
    assert "enblue: vfs = 4: it matches by driver: mlx5_core" in left(done)
    assert "delay-virtual-functions-rebind" in left(done)
    assert "sriov_vf0" in left(done)


def test_netplan_matches_by_name_where_it_is_one_name() -> None:
    head = "network:\n  version: 2\n  ethernets:\n    card:\n      virtual-function-count: 3\n"
    assert rules(run("a.yaml", head))["sriov"][0]["match"] == {"net": "card"}
    done = run("a.yaml", f"{head}      match: {{name: enp3s0}}\n")
    assert rules(done)["sriov"][0]["match"] == {"net": "enp3s0"}
    done = run("a.yaml", f"{head}      match:\n        name: enp*\n")
    assert rules(done) == {}
    done = run("a.yaml", f"{head}      match: {{macaddress: '00:11'}}\n      set-name: wan0\n")
    assert rules(done)["sriov"][0]["match"] == {"net": "wan0"}


def test_a_node_policy_of_the_operator_gives_count_mode_and_the_vfs_driver() -> None:
    done = field("42", "policy.yaml")
    (rule,) = rules(done)["sriov"]
    assert rule["match"] == {"address": "0000:65:00.0", "id": "15b3:101d"}
    assert (rule["vfs"], rule["eswitch"], len(rule["vf"])) == (8, "switchdev", 8)
    assert {entry["driver"] for entry in rule["vf"]} == {"vfio-pci"}
    assert "resourceName" in left(done)


def test_a_node_policy_may_name_ports_or_ids_alone() -> None:
    head = "kind: SriovNetworkNodePolicy\nspec:\n  numVfs: 2\n  nicSelector:\n"
    done = run("p.yaml", f'{head}    pfNames:\n    - "ens1f0#0-1"\n    - ens1f1\n')
    assert [rule["match"] for rule in rules(done)["sriov"]] == [
        {"net": "ens1f0"},
        {"net": "ens1f1"},
    ]
    assert "a part of the VFs" in left(done)
    done = run("p.yaml", f"{head}    vendor: '15b3'\n    deviceID: 101d\n")
    assert rules(done)["sriov"][0]["match"] == {"id": "15b3:101d"}
    done = run("p.yaml", f"{head}    vendor: '15b3'\n")
    assert rules(done) == {} and "half an id" in left(done)


@pytest.mark.parametrize(
    "text", ["a: &x 1", "a: |\n  b", "\ta: 1", "a: [1", "a: 1\na: 2", "a: {b}"]
)
def test_yaml_that_is_not_understood_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"x\.yaml:\d+: "):
        parse_yaml(text, "x.yaml")


@given(st.text(alphabet=" \n-:{}[],#'\"ab0|&\t", max_size=80))
def test_reading_yaml_ends_for_any_text(text: str) -> None:
    try:
        parse_yaml(text, "x.yaml")
    except UsageError:
        return


@pytest.mark.parametrize(
    "kind", ["udev", "tmpfiles", "sysfs", "netplan", "node-policy", "nix", "grub", "refind"]
)
@given(text=st.text(alphabet=" \n-:{}[],#='\"ab0/$ATRKERNEL", max_size=80))
def test_every_form_takes_any_text(kind: str, text: str) -> None:
    try:
        rules(run("x", text, kind))
    except UsageError:
        return


def test_an_empty_policy_is_never_a_success(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "driverctl.d"
    empty.mkdir()
    for words in (["import", str(empty)], ["--json", "import", str(empty)]):
        assert main(words) == 1
    capsys.readouterr()


def test_dpdks_driver_is_spelt_as_the_kernel_spells_it() -> None:
    done = run("text", "dpdk-devbind.py --bind=vfio_pci 01:00.1\necho done\n")
    assert rules(done)["device"][0]["driver"] == "vfio-pci"
    assert "1 other line" in left(done)
