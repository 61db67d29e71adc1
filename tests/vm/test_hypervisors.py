"""What each hypervisor is told, held against its own schema or parser where there is one."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator

from tests.oracles import libvirt as oracle
from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.errors import Unsupported, UsageError, VfiotoolError
from vfiotool.lab.qemu import Qemu, find
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.importers.yaml_subset import parse_yaml
from vfiotool.snapshot.load import open_root
from vfiotool.vm import cloud_hypervisor, incus, kubevirt, libvirt, proxmox, qemu, yaml_text
from vfiotool.vm.handed import Handed, handed, handed_socket
from vfiotool.vm.machine import machine_of
from vfiotool.vm.releases import oldest, parse_release, require_release
from vfiotool.vm.script import start_script

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

CASES = {
    "gpu and audio": GPU,
    "a domain above ffff": [WIDE],
    "a network VF": [vf()],
    "mdev": [MDEV],
    "vfio-ccw": [CCW],
    "vfio-ap": [AP],
    "vDPA net": [NET],
    "vDPA disk": [BLOCK],
    "vhost-user disks": [DISK, replace(DISK, name="b", path="/run/b.sock")],
    "vhost-user net": [NIC],
    "vendor vGPU": [VGPU],
}


def domain(devices: list[Handed], *, iommufd: bool = False) -> str:
    memory = libvirt.SHARED_MEMORY if libvirt.needs_shared_memory(devices) else ""
    return (
        "<domain type='kvm'><name>vm1</name><memory>1048576</memory>"
        f"{memory}<vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
        f"{libvirt.hostdevs(devices, iommufd=iommufd)}</devices></domain>"
    )


@pytest.mark.parametrize("suite", oracle.RELEASES)
@pytest.mark.parametrize("case", CASES)
def test_libvirts_own_schema_takes_the_elements(suite: str, case: str) -> None:
    if isinstance(oracle.schema_of(suite), str):
        pytest.skip(str(oracle.schema_of(suite)))
    if isinstance(oracle.xmllint(), str):
        pytest.skip(str(oracle.xmllint()))
    needs = parse_release(oldest("libvirt", libvirt.features_of(CASES[case], iommufd=False)))
    found = oracle.faults(suite, domain(CASES[case]))
    if suite == "bookworm" and needs > (9, 0):
        assert found, "the oldest release that is named is too new"
    else:
        assert not found, found


def test_iommufd_is_in_the_newest_schema_and_not_in_that_of_debian_12() -> None:
    for suite in oracle.RELEASES:
        if isinstance(oracle.schema_of(suite), str) or isinstance(oracle.xmllint(), str):
            pytest.skip("libvirt's schemas or xmllint cannot be fetched here")
        found = oracle.faults(suite, domain(GPU, iommufd=True))
        assert bool(found) == (suite == "bookworm"), found


def test_a_network_vf_keeps_its_mac_and_vlan() -> None:
    element = ElementTree.fromstring(libvirt.hostdevs([vf()]))
    assert (element.tag, element.attrib["type"]) == ("interface", "hostdev")
    assert element.find("mac").attrib == {"address": "52:54:00:00:00:01"}  # type: ignore[union-attr]
    assert element.find("vlan/tag").attrib == {"id": "10"}  # type: ignore[union-attr]
    bare = replace(vf(), network=VfSettings(0, mac="00:00:00:00:00:00", vlan=0))
    plain = ElementTree.fromstring(libvirt.hostdevs([bare]))
    assert plain.find("mac") is None and plain.find("vlan") is None


def test_libvirt_keeps_the_functions_of_one_card_together() -> None:
    elements = [ElementTree.fromstring(text) for text in libvirt.elements(GPU)]
    places = [element.findall("address")[-1].attrib for element in elements]
    assert [place["function"] for place in places] == ["0x0", "0x1"]
    assert {place["bus"] for place in places} == {"0x08"}
    assert [place.get("multifunction") for place in places] == ["on", None]


def test_libvirt_has_no_element_for_vfio_user() -> None:
    with pytest.raises(Unsupported, match="no element for vfio-user"):
        libvirt.hostdevs([USER])


def test_qemu_shares_the_memory_where_another_process_looks_into_it() -> None:
    words = qemu.arguments([DISK, NET], memory_bytes=2 << 30)
    assert words[:6] == [
        "-m",
        "2048M",
        "-object",
        "memory-backend-memfd,id=vfiotool-mem,size=2048M,share=on",
        "-numa",
        "node,memdev=vfiotool-mem",
    ]
    assert "-netdev type=vhost-vdpa,id=vdpa1,vhostdev=/dev/vhost-vdpa-0" in " ".join(words)
    assert "memory-backend" not in " ".join(qemu.arguments(GPU, memory_bytes=2 << 30))


def test_vfio_user_is_an_object_in_json() -> None:
    words = qemu.arguments([USER])
    found = json.loads(words[-1])
    assert found["driver"] == "vfio-user-pci"
    assert found["socket"] == {"type": "unix", "path": "/run/edu.sock"}


def test_vendor_vgpus_are_named_by_path() -> None:
    assert "vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:41:00.4," in qemu.arguments([VGPU])[-1]


@pytest.fixture(scope="module")
def real_qemu() -> Qemu:
    try:
        return find()
    except VfiotoolError as error:
        pytest.skip(f"there is no QEMU here: {error}")


@pytest.mark.parametrize(
    ("devices", "complaint"),
    [
        (GPU, "0000:01:00.0: no such host device"),
        ([WIDE], "10000:e1:00.0: no such host device"),
        ([MDEV], f"{UUID}: no such host device"),
        ([DISK], "/run/vm1.sock"),
        ([BLOCK], "/dev/vhost-vdpa-1"),
    ],
    ids=["functions", "wide", "mdev", "vhost-user", "vdpa"],
)
def test_a_real_qemu_parses_the_options_and_misses_only_the_device(
    devices: list[Handed], complaint: str, real_qemu: Qemu
) -> None:
    machine = [
        "-nodefaults",
        "-machine",
        "q35,accel=tcg",
        "-display",
        "none",
        "-S",
        "-monitor",
        "none",
    ]
    words = qemu.arguments(devices, memory_bytes=64 << 20)
    done = subprocess.run(
        [*real_qemu.command, *machine, "-serial", "none", *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **dict(real_qemu.environment)},
    )
    assert done.returncode != 0
    if "is not a valid device model name" in done.stderr:
        pytest.skip(f"this QEMU is too old: {done.stderr.strip()}")
    assert complaint in done.stderr, done.stderr


def test_cloud_hypervisor_takes_each_kind_by_its_option() -> None:
    words = cloud_hypervisor.arguments([MDEV, NET, DISK, NIC, USER])
    assert words == [
        "--memory",
        "size=1024M,shared=on",
        "--device",
        f"path=/sys/bus/mdev/devices/{UUID}",
        "--vdpa",
        "path=/dev/vhost-vdpa-0,num_queues=1",
        "--disk",
        "vhost_user=on,socket=/run/vm1.sock",
        "--net",
        "vhost_user=on,socket=/run/net1.sock",
        "--user-device",
        "socket=/run/edu.sock",
    ]


@pytest.mark.parametrize(
    ("program", "features", "expected"),
    [
        ("QEMU", set(), "2.9"),
        ("QEMU", {"iommufd", "vf-token"}, "9.0"),
        ("QEMU", {"vfio-user", "iommufd"}, "10.1"),
        ("libvirt", {"vdpa"}, "9.8"),
    ],
)
def test_the_oldest_release_is_named(program: str, features: set[str], expected: str) -> None:
    assert oldest(program, features) == expected
    require_release(program, expected, features)
    require_release(program, None, features)
    with pytest.raises(Unsupported) as caught:
        require_release(program, "1.0", features)
    assert expected in str(caught.value.hint)


def test_a_release_that_is_none_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        parse_release("latest")
    root = str(HOSTS / "shared-group")
    line = ["--root", root, "vm", "qemu", "02:01.0", "--iommufd", "--release"]
    assert main([*line, "8.2"]) == 8
    assert "the oldest QEMU that takes these devices is 9.0" in capsys.readouterr().err
    assert main([*line, "9.0.2"]) == 0
    assert main([*line, "new"]) == 2


def test_proxmox_keeps_a_card_together_and_hands_the_rest_to_qemu() -> None:
    lines = proxmox.lines([*GPU, vf(), WIDE, MDEV])
    assert lines[:3] == [
        "machine: q35",
        "hostpci0: 0000:01:00.0;0000:01:00.1,pcie=1,x-vga=1",
        "hostpci1: 0000:03:10.0,pcie=1",
    ]
    assert lines[3].startswith("args: -device pcie-root-port,")
    assert "sysfsdev=/sys/bus/pci/devices/10000:e1:00.0" in lines[3]
    with pytest.raises(Unsupported, match="takes 16"):
        proxmox.lines([function(f"0000:{bus:02x}:00.0") for bus in range(1, 18)])


def test_incus_has_two_types() -> None:
    found: Any = incus.devices_of([GPU[0], vf()])["devices"]
    assert found["vfio-0000-01-00-0"] == {
        "type": "gpu",
        "gputype": "physical",
        "pci": "0000:01:00.0",
    }
    assert found["vfio-0000-03-10-0"] == {"type": "pci", "address": "0000:03:10.0"}
    with pytest.raises(Unsupported) as caught:
        incus.devices_of([replace(MDEV, parent="0000:00:02.0")])
    assert "mdev: GRID T4-2Q" in str(caught.value.hint)


# KubeVirt's API v1, PermittedHostDevices and HostDevice; SriovNetworkNodePolicy and SriovNetwork
# as sriov-network-operator's config/crd/bases has them; the device plug-in's resourceList.
STRING = {"type": "string", "minLength": 1}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def listed(**properties: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": closed(list(properties), **properties)}


PERMITTED = closed(
    [],
    pciHostDevices=listed(
        pciVendorSelector={"type": "string", "pattern": "^[0-9A-F]{4}:[0-9A-F]{4}$"},
        resourceName={"type": "string", "pattern": "^[a-z0-9.]+/[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"},
    ),
    mediatedDevices=listed(mdevNameSelector=STRING, resourceName=STRING),
)
POLICY = closed(
    ["nicSelector", "nodeSelector", "numVfs", "resourceName"],
    resourceName={"type": "string", "pattern": "^[a-zA-Z0-9_]+$"},
    nodeSelector={"type": "object", "additionalProperties": STRING},
    numVfs={"type": "integer", "minimum": 0},
    externallyManaged={"type": "boolean"},
    nicSelector=closed(
        [],
        vendor=STRING,
        deviceID=STRING,
        rootDevices={"type": "array", "items": STRING},
        pfNames={"type": "array", "items": STRING},
    ),
    deviceType={"enum": ["netdevice", "vfio-pci"]},
)
NETWORK = closed(
    ["resourceName"],
    resourceName=STRING,
    networkNamespace=STRING,
    vlan={"type": "integer", "minimum": 0, "maximum": 4096},
)
RESOURCES = closed(
    ["resourceList"],
    resourceList={
        "type": "array",
        "items": closed(
            ["resourceName", "selectors"],
            resourceName={"type": "string", "pattern": "^[a-zA-Z0-9_]+$"},
            selectors=closed(
                [],
                drivers={"type": "array", "items": STRING},
                pciAddresses={"type": "array", "items": STRING},
            ),
        ),
    },
)


def hold(schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator.check_schema(schema)
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(value)]
    assert not errors, errors


def test_kubevirts_resources_are_as_published() -> None:
    documents: Any = kubevirt.resources([*GPU, MDEV, vf(), vf("0000:03:10.2")])
    kinds = [item["kind"] for item in documents]
    assert kinds == [
        "KubeVirt",
        "VirtualMachine",
        "ConfigMap",
        "SriovNetworkNodePolicy",
        "SriovNetwork",
    ]
    cluster, machine, plugin, policy, network = documents
    hold(PERMITTED, cluster["spec"]["configuration"]["permittedHostDevices"])
    wanted = machine["spec"]["template"]["spec"]["domain"]["devices"]["hostDevices"]
    hold(listed(name=STRING, deviceName=STRING), wanted)
    permitted = json.dumps(cluster)
    assert all(item["deviceName"] in permitted for item in wanted)
    hold(RESOURCES, json.loads(plugin["data"]["config.json"]))
    hold(POLICY, policy["spec"])
    hold(NETWORK, network["spec"])
    assert (policy["spec"]["numVfs"], network["spec"]["vlan"]) == (2, 10)
    with pytest.raises(Unsupported):
        kubevirt.resources([DISK])


def plain(nodes: Any) -> Any:
    return [(node.key, node.value) for node in nodes]


def test_yaml_is_what_a_parser_reads() -> None:
    text = yaml_text.document(
        {"a": {"b": ["x", {"c": "10de:2684", "d": "true"}], "e": []}, "f": 1, "g": "no"}
    )
    assert text.splitlines() == [
        "a:",
        "  b:",
        "    - x",
        '    - c: "10de:2684"',
        '      d: "true"',
        "  e: []",
        "f: 1",
        'g: "no"',
    ]
    assert parse_yaml(text.replace("[]", "x"), "here")


SCRIPTED = [
    ("qemu", qemu.arguments(GPU, memory_bytes=2 << 30)),
    ("cloud-hypervisor", cloud_hypervisor.arguments(GPU, memory_bytes=2 << 30)),
]


@pytest.mark.parametrize(("kind", "words"), SCRIPTED, ids=[kind for kind, _ in SCRIPTED])
def test_a_script_binds_what_is_not_ready_and_gives_it_back(
    kind: str, words: list[str], tmp_path: Path
) -> None:
    """Run with stand-ins: the second function is ready before, the machine fails."""
    calls = tmp_path / "calls"
    program = "qemu-system-x86_64" if kind == "qemu" else kind
    (tmp_path / "vfiotool").write_text(
        "#!/bin/sh\n"
        f'echo "vfiotool $*" >> {calls}\n'
        f'case "$*" in "vm check 0000:01:00.0") [ -e {tmp_path}/bound ] ;;\n'
        f"bind*) touch {tmp_path}/bound ;; esac\n"
    )
    (tmp_path / program).write_text(f'#!/bin/sh\necho "run $*" >> {calls}\nexit 3\n')
    for name in ("vfiotool", program):
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "start"
    script.write_text(start_script(kind, GPU, words, memory="2G", vcpus=4))
    done = subprocess.run(
        ["sh", str(script), "-kernel", "my kernel"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    lines = calls.read_text().splitlines()
    assert lines[:4] == [
        "vfiotool vm check 0000:01:00.0",
        "vfiotool bind 0000:01:00.0",
        "vfiotool vm check 0000:01:00.1",
        "vfiotool vm check 0000:01:00.0 0000:01:00.1 --memory 2G --vcpus 4",
    ]
    assert lines[4].startswith("run ") and lines[4].endswith("-kernel my kernel")
    assert lines[5:] == ["vfiotool release 0000:01:00.0"]


def test_a_script_starts_the_machine_of_this_hosts_architecture() -> None:
    words = qemu.arguments(GPU, memory_bytes=2 << 30)
    for architecture, start in {
        "arm64": "qemu-system-aarch64 -machine virt,accel=kvm:tcg,gic-version=max -cpu max -smp 4",
        "ppc64": "qemu-system-ppc64 -machine pseries,accel=kvm:tcg -smp 4",
        None: "qemu-system-x86_64 -machine q35,accel=kvm:tcg -cpu max -smp 4",
    }.items():
        guest = machine_of(architecture)
        script = start_script("qemu", GPU, words, memory="2G", vcpus=4, guest=guest)
        assert f"\n{start} " in script


def test_every_command_prints_for_people_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(HOSTS / "shared-group")]
    for name in ("qemu", "libvirt", "cloud-hypervisor", "kubevirt", "proxmox", "incus"):
        assert main([*root, "vm", name, "02:01.0"]) == 0
        shown = capsys.readouterr().out
        assert shown.strip() and "\\\n" not in shown
        assert main([*root, "--json", "vm", name, "02:01.0"]) == 0
        assert json.loads(capsys.readouterr().out)["format_version"] == "1.0"
    assert main([*root, "vm", "qemu", "02:01.0", "--script"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/sh\n")


def test_devices_of_a_fixture_keep_their_type() -> None:
    inventory = read_inventory(open_root(str(HOSTS / "mdev-parents")))
    device = handed(inventory, inventory.mdevs[0].uuid)
    assert device.parent == inventory.mdevs[0].parent and device.is_mdev
