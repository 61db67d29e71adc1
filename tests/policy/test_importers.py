"""Other tools' settings become policies, and what cannot be carried over is said."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.errors import UsageError
from vfiotool.policy.importers import Import, detect, import_files
from vfiotool.policy.importers.rules import Rule, to_toml, to_toml_value
from vfiotool.policy.parse import parse_policy

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def policy(done: Import) -> dict[str, Any]:
    parse_policy(done.policy, "imported")
    parsed = tomllib.loads(done.policy)
    assert parsed.pop("version") == 1
    return parsed


def run(name: str, text: str, kind: str | None = None, **more: Any) -> Import:
    return import_files(name, {name: text}, kind, **more)


def whys(done: Import) -> str:
    return "\n".join(f"{item.where}: {item.what}: {item.why}" for item in done.leftovers)


# driverctl


def test_driverctl_overrides_become_device_rules() -> None:
    files = {
        "pci-0000:01:00.0": "vfio-pci\n",
        "pci-0000:02:00.0": "none\n",
        "vmbus-f5bee29c-1741-4aad-a4c2-8fdedb46dcc2": "uio_hv_generic\n",
        "README": "hands off",
        "pci-0000:03:00.0": "",
    }
    done = import_files("/etc/driverctl.d", files)
    assert done.kind == "driverctl"
    assert policy(done) == {
        "device": [
            {"match": {"address": "0000:01:00.0"}, "driver": "vfio-pci"},
            {"match": {"address": "0000:02:00.0"}, "driver": "none"},
        ]
    }
    assert {item.where for item in done.leftovers} == {
        "vmbus-f5bee29c-1741-4aad-a4c2-8fdedb46dcc2",
        "README",
        "pci-0000:03:00.0",
    }


def test_a_single_override_file_is_recognized() -> None:
    assert detect("x", {"pci-0000:01:00.0": "vfio-pci\n"}) == "driverctl"


@pytest.mark.parametrize("content", ["../../lib/evil", "vfio-pci\x1b[2J", "a" * 5000, "x/y"])
def test_a_hostile_driver_name_is_refused(content: str) -> None:
    with pytest.raises(UsageError) as caught:
        import_files("d", {"pci-0000:01:00.0": content}, "driverctl")
    assert "refused" in caught.value.message
    assert len(caught.value.message) < 200


# mdevctl


def test_mdevctl_definitions_keep_the_order_and_repetition_of_attributes() -> None:
    definition = {
        "mdev_type": "vfio_ap-passthrough",
        "start": "auto",
        "attrs": [
            {"assign_adapter": "5"},
            {"assign_domain": "4"},
            {"assign_adapter": "6"},
            {"assign_domain": "0xab"},
        ],
    }
    done = import_files("mdevctl.d", {f"matrix/{UUID.upper()}": json.dumps(definition)})
    assert done.kind == "mdevctl"
    [rule] = policy(done)["mdev"]
    assert rule["uuid"] == UUID
    assert rule["attrs"] == [
        ["assign_adapter", "5"],
        ["assign_domain", "4"],
        ["assign_adapter", "6"],
        ["assign_domain", "0xab"],
    ]
    assert not done.leftovers


def test_manual_and_broken_definitions_and_scripts_are_left_over() -> None:
    other = UUID.replace("1001", "1002")
    files = {
        f"mtty/{UUID}": '{"mdev_type": "mtty-2", "start": "manual", "attrs": []}',
        f"mtty/{other}": "{",
        "scripts.d/callouts/x.sh": "#!/bin/sh",
    }
    done = import_files("mdevctl.d", files)
    assert not done.rules
    assert "by hand" in whys(done) and "not JSON" in whys(done) and "script" in whys(done)


def test_an_attribute_that_cannot_be_written_keeps_the_mdev_out() -> None:
    text = '{"mdev_type": "mtty-2", "start": "auto", "attrs": [{"a": 1}]}'
    done = import_files("d", {f"mtty/{UUID}": text}, "mdevctl")
    assert not done.rules and "not a string" in whys(done)


def test_an_attribute_of_a_sub_folder_is_kept_and_an_unwritable_value_is_not() -> None:
    text = '{"mdev_type": "t", "start": "auto", "attrs": [{"vendor/budget": "1"}]}'
    [rule] = policy(import_files("d", {f"mtty/{UUID}": text}, "mdevctl"))["mdev"]
    assert rule["attrs"] == [["vendor/budget", "1"]]
    done = import_files("d", {f"mtty/{UUID}": text.replace('"1"', '"1\\n2"')}, "mdevctl")
    assert not done.rules and "one line" in whys(done)


@pytest.mark.parametrize("path", [f"../run/x/{UUID}", f"a/../{UUID}", f"x\n/{UUID}"])
def test_a_definition_outside_its_folder_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="refused"):
        import_files("d", {path: "{}"}, "mdevctl")


def test_an_attribute_that_leaves_the_device_is_refused() -> None:
    text = '{"mdev_type": "t", "start": "auto", "attrs": [{"../../remove": "1"}]}'
    with pytest.raises(UsageError, match="refused"):
        import_files("d", {f"mtty/{UUID}": text}, "mdevctl")


# Kernel command line and modprobe.d


def test_ids_on_the_command_line_become_rules_by_id() -> None:
    line = (
        "BOOT_IMAGE=/vmlinuz root=/dev/sda1 intel_iommu=on iommu=pt "
        "vfio-pci.ids=10de:2684,10de:22ba:ffffffff:ffffffff,8086:10C9:8086:0001 quiet"
    )
    done = run("cmdline", line)
    assert done.kind == "cmdline"
    assert policy(done)["device"] == [
        {"match": {"id": "10de:2684"}, "driver": "vfio-pci"},
        {"match": {"id": "10de:22ba"}, "driver": "vfio-pci"},
        {"match": {"id": "8086:10c9:8086:0001"}, "driver": "vfio-pci"},
    ]
    assert "intel_iommu=on" in whys(done) and "iommu=pt" in whys(done)
    assert "quiet" not in whys(done)


def test_the_last_ids_on_the_command_line_counts() -> None:
    done = run("cmdline", "vfio_pci.ids=1234:11e8 vfio-pci.ids=1b36:0010")
    assert [rule["match"]["id"] for rule in policy(done)["device"]] == ["1b36:0010"]


def test_grub_settings_are_read_inside_their_quotes() -> None:
    text = '# a comment vfio-pci.ids=ffff:0001\nGRUB_CMDLINE_LINUX="quiet vfio-pci.ids=1234:11e8"\n'
    done = run("grub", text)
    assert done.kind == "grub"
    assert [rule["match"]["id"] for rule in policy(done)["device"]] == ["1234:11e8"]


def test_modprobe_options_over_continued_lines_and_the_other_lines_reported() -> None:
    text = (
        "# vfio\noptions vfio_pci disable_vga=1 \\\n  ids=10de:2684,10de:22ba\n"
        "softdep nvidia pre: vfio-pci\nblacklist nouveau\noptions kvm ignore_msrs=1\n"
    )
    done = run("vfio.conf", text)
    assert done.kind == "modprobe"
    assert [rule["match"]["id"] for rule in policy(done)["device"]] == ["10de:2684", "10de:22ba"]
    assert [item.where for item in done.leftovers] == [
        "vfio.conf:2",
        "vfio.conf:4",
        "vfio.conf:5",
        "vfio.conf:6",
    ]
    assert "boot enable" in whys(done)


def test_a_later_file_of_modprobe_d_counts_and_the_earlier_is_reported() -> None:
    files = {"a.conf": "options vfio-pci ids=1111:2222", "b.conf": "options vfio-pci ids=3333:4444"}
    done = import_files("modprobe.d", files)
    assert [rule["match"]["id"] for rule in policy(done)["device"]] == ["3333:4444"]
    assert "a.conf:1" in whys(done)


@pytest.mark.parametrize(
    "ids", ["ffffffff:1234", "12345:1", "x:y", "1234", "1:2:3:4:5:6", "1:2:3", "1:2:3:ffffffff"]
)
def test_ids_that_would_take_more_or_mean_nothing_are_left_over(ids: str) -> None:
    done = run("cmdline", f"vfio-pci.ids={ids}", "cmdline")
    assert not done.rules and len(done.leftovers) == 1


# libvirt

DOMAIN = """<domain type='kvm'><name>x</name><devices>
<hostdev mode='subsystem' type='pci' managed='yes'><driver name='vfio'/>
 <source><address domain='0x0000' bus='0x0a' slot='0x1f' function='0x7'/></source>
 <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/><rom bar='off'/>
</hostdev>
<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/></source></hostdev>
<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>
 <address uuid='83b8f4f2-509f-382f-3c1e-e6bfe0fa1001'/></source></hostdev>
<interface type='hostdev'><mac address='52:54:00:6d:90:02'/>
 <source><address type='pci' domain='0x0000' bus='0x02' slot='0x10' function='0x1'/></source>
 <vlan><tag id='42'/></vlan></interface>
<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>
</devices></domain>"""


def test_a_domains_hostdevs_become_device_rules() -> None:
    done = run("vm.xml", DOMAIN)
    assert done.kind == "libvirt"
    assert [rule["match"]["address"] for rule in policy(done)["device"]] == [
        "0000:0a:1f.7",
        "0000:02:10.1",
    ]
    for text in (
        "managed='no'",
        "type='usb'",
        "nodedev-dumpxml",
        "<rom>",
        "<vlan>",
        "vhost-vdpa-0",
    ):
        assert text in whys(done)


def test_a_node_devices_decimal_address_and_vfs() -> None:
    vfs = "".join(
        f"<address domain='0x0000' bus='0x02' slot='0x10' function='0x{n}'/>" for n in range(4)
    )
    text = (
        "<device><name>pci_0000_10_00_1</name><driver><name>igb</name></driver>"
        "<capability type='pci'><domain>0</domain><bus>16</bus><slot>0</slot><function>1</function>"
        f"<capability type='virt_functions' maxCount='7'>{vfs}</capability>"
        "</capability></device>"
    )
    done = run("nodedev.xml", text)
    assert policy(done) == {"sriov": [{"match": {"address": "0000:10:00.1"}, "vfs": 4}]}


def test_a_node_devices_mdev_keeps_its_attributes() -> None:
    text = (
        f"<device><name>mdev_{UUID.replace('-', '_')}_0000_06_00_0</name>"
        "<parent>pci_0000_06_00_0</parent><capability type='mdev'><type id='nvidia-11'/>"
        f"<uuid>{UUID}</uuid><attr name='a' value='1'/><attr name='a' value='2'/>"
        "</capability></device>"
    )
    [rule] = policy(run("m.xml", text))["mdev"]
    assert rule == {
        "parent": "0000:06:00.0",
        "type": "nvidia-11",
        "uuid": UUID,
        "attrs": [["a", "1"], ["a", "2"]],
    }


@pytest.mark.parametrize(
    ("named", "parent"),
    [
        ("<parent>mtty_mtty</parent>", "mtty"),
        ("<parent>css_0_0_0052</parent>", "0.0.0052"),
        ("<parent>ap_matrix</parent>", "matrix"),
        ("<parent>computer</parent>", None),
        ("<parent>some_thing_else</parent>", None),
    ],
)
def test_a_parent_is_named_as_the_kernel_names_it_or_not_at_all(
    named: str, parent: str | None
) -> None:
    text = f"<device><name>x</name>{named}<capability type='mdev'><type id='t'/><uuid>{UUID}</uuid>"
    done = run("m.xml", f"{text}</capability></device>")
    assert [rule["parent"] for rule in policy(done).get("mdev", [])] == ([parent] if parent else [])
    assert bool(done.leftovers) == (parent is None)
    given = text.replace("<uuid>", "<parent_addr>mdpy</parent_addr><uuid>")
    [rule] = policy(run("m.xml", f"{given}</capability></device>"))["mdev"]
    assert rule["parent"] == "mdpy"


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>',
        '<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain/>',
        '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY % p SYSTEM "http://x/">%p;]><domain/>',
        "<a>" * 5000 + "</a>" * 5000,
    ],
)
def test_document_types_entities_and_endless_nesting_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="refused"):
        run("evil.xml", text)


def test_broken_xml_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match="not well-formed"):
        run("x.xml", "<domain><devices>")


def test_an_address_out_of_range_is_left_over() -> None:
    text = DOMAIN.replace("bus='0x0a'", "bus='0x1ff'")
    assert "could be read" in whys(run("vm.xml", text))


# Proxmox

MAPPING = """gpu
\tdescription the big one
\tmap id=10de:2684,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:16f3
\tmap id=10de:2684,iommugroup=20,node=pve2,path=0000:41:00.0;0000:41:00.1

vgpu
\tmap id=10de:2230,iommugroup=3,node=pve1,path=0000:61:00.0
\tmdev 1
"""


def test_a_clusters_mapping_needs_the_node_when_there_are_several() -> None:
    done = run("pci.cfg", MAPPING)
    assert done.kind == "proxmox-mapping"
    assert not done.rules and "--node" in whys(done)


def test_a_mapping_of_one_node() -> None:
    done = run("pci.cfg", MAPPING, node="pve2")
    assert policy(done)["device"] == [
        {"match": {"address": "0000:41:00.0"}, "driver": "vfio-pci"},
        {"match": {"address": "0000:41:00.1"}, "driver": "vfio-pci"},
    ]


def test_a_path_without_function_takes_the_group_and_says_so() -> None:
    done = run("pci.cfg", MAPPING, node="pve1")
    assert policy(done)["device"] == [
        {"match": {"address": "0000:01:00.0"}, "driver": "vfio-pci", "group": "whole"}
    ]
    assert "all functions" in whys(done) and "parent of mdevs" in whys(done)


def test_a_machines_hostpci_lines_and_not_those_of_its_snapshots() -> None:
    text = (
        "cores: 4\nhostpci0: 0000:01:00.0,pcie=1,x-vga=1\nhostpci1: host=02:00.0;02:00.1\n"
        "hostpci2: mapping=gpu\nhostpci3: 0000:06:00.0,mdev=nvidia-63\n"
        "[before]\nhostpci4: 0000:09:00.0\n"
    )
    done = run("123.conf", text)
    assert done.kind == "proxmox-vm"
    assert [rule["match"]["address"] for rule in policy(done)["device"]] == [
        "0000:01:00.0",
        "0000:02:00.0",
        "0000:02:00.1",
    ]
    [mdev] = policy(done)["mdev"]
    assert mdev["uuid"] == "00000003-0000-0000-0000-000000000123"
    for text in ("pcie=1", "x-vga=1", "gpu", "[before]"):
        assert text in whys(done)


# DPDK


def test_dpdk_command_lines() -> None:
    text = (
        "#!/bin/sh\nmodprobe vfio-pci && dpdk-devbind.py -b vfio-pci 0000:01:00.0 02:00.0\n"
        "sudo python3 ./usertools/dpdk-devbind.py --bind=vfio-pci --force \\\n   eth1 $NIC\n"
        "dpdk-devbind.py -u 0000:03:00.0; dpdk-devbind.py --status\n"
    )
    done = run("setup.sh", text)
    assert done.kind == "dpdk"
    assert policy(done)["device"] == [
        {"match": {"address": "0000:01:00.0"}, "driver": "vfio-pci"},
        {"match": {"address": "0000:02:00.0"}, "driver": "vfio-pci"},
        {"match": {"address": "0000:03:00.0"}, "driver": "none"},
    ]
    for text in ("--force", "eth1", "$NIC"):
        assert text in whys(done)


# All of them


def test_the_first_of_two_contradicting_rules_stands_and_the_other_is_told() -> None:
    done = run(
        "x.sh", "dpdk-devbind -b vfio-pci 01:00.0\ndpdk-devbind -b uio_pci_generic 01:00.0\n"
    )
    assert [rule["driver"] for rule in policy(done)["device"]] == ["vfio-pci"]
    assert "stands first" in whys(done)


def test_a_source_that_fits_nothing_names_the_kinds() -> None:
    with pytest.raises(UsageError) as caught:
        run("notes.txt", "buy milk\n")
    assert "--from" in (caught.value.hint or "") and "libvirt" in (caught.value.hint or "")


def test_an_empty_folder_imports_to_an_empty_policy() -> None:
    done = import_files("/etc/driverctl.d", {})
    assert policy(done) == {} and not done.leftovers


@given(
    st.recursive(
        st.text() | st.integers(-(2**63), 2**63 - 1) | st.booleans(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_is_printed_reads_back_as_toml(value: Any) -> None:
    assert tomllib.loads(f"a = {to_toml_value(value)}") == {"a": value}


@given(st.text(), st.text())
def test_comments_never_break_out_of_their_line(where: str, origin: str) -> None:
    text = to_toml([Rule("device", {"driver": "x"}, where)], origin)
    assert tomllib.loads(text) == {"version": 1, "device": [{"driver": "x"}]}


@given(
    st.sampled_from(
        ["cmdline", "modprobe", "libvirt", "proxmox-mapping", "proxmox-vm", "dpdk", "driverctl"]
    ),
    st.text(alphabet="hostpci0:map =,;./\\\"'<>$\t\n#vfio-pci.ids=1234:11e8 dpdk-devbind -b -u"),
)
def test_no_text_makes_an_importer_fail_otherwise_than_by_a_usage_error(
    kind: str, text: str
) -> None:
    try:
        done = import_files("f", {"pci-0000:01:00.0": text}, kind)
    except UsageError:
        return
    parse_policy(done.policy, "imported")
