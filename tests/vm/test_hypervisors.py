"""What each hypervisor is told, held against its own schema or parser where there is one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.oracles import libvirt as oracle
from tests.vm.given import (
    AP,
    BLOCK,
    CCW,
    DISK,
    GPU,
    HOSTS,
    MDEV,
    NET,
    NIC,
    USER,
    UUID,
    VGPU,
    WIDE,
    function,
    vf,
)
from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.errors import Unsupported, UsageError, VfiotoolError
from vfiotool.lab.qemu import Qemu, find
from vfiotool.netlink.route import VfSettings
from vfiotool.policy.importers.yaml_subset import parse_yaml
from vfiotool.snapshot.load import open_root
from vfiotool.vm import cloud_hypervisor, incus, libvirt, proxmox, qemu, yaml_text
from vfiotool.vm.handed import Handed, handed, handed_socket
from vfiotool.vm.machine import machine_of
from vfiotool.vm.releases import oldest, parse_release, require_release
from vfiotool.vm.script import start_script

CASES = {
    "gpu and audio": GPU,
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


def test_libvirt_and_incus_cannot_name_a_domain_above_ffff() -> None:
    """libvirt says host=10000:…, which QEMU refuses; Incus takes four digits of the domain."""
    with pytest.raises(Unsupported, match="domain is above ffff"):
        libvirt.hostdevs([WIDE])
    with pytest.raises(Unsupported, match="domain above ffff"):
        incus.devices_of([WIDE])


def test_each_of_thirty_disks_has_a_target_of_its_own() -> None:
    disks = [replace(DISK, name=f"/run/{n}", path=f"/run/{n}") for n in range(30)]
    found = [ElementTree.fromstring(text).find("target") for text in libvirt.elements(disks)]
    names = [target.attrib["dev"] for target in found if target is not None]
    assert len(set(names)) == 30
    assert (names[0], names[24], names[25], names[29]) == ("vdb", "vdz", "vdaa", "vdae")


ODD = handed_socket("vhost-user-blk", "/run/a, b'[1]<&>.sock")


def test_a_path_with_a_comma_is_read_back_as_it_is() -> None:
    words = qemu.arguments([ODD])
    assert "socket,id=vhost-user-blk0-chr,path=/run/a,, b'[1]<&>.sock" in words
    line = shlex.split(" ".join(map(shlex.quote, words)))
    assert line == words
    source = ElementTree.fromstring(libvirt.hostdevs([ODD])).find("source")
    assert source is not None and source.attrib["path"] == ODD.path
    assert cloud_hypervisor.arguments([ODD])[-1] == f'vhost_user=on,socket="{ODD.path}"'
    with pytest.raises(Unsupported, match="quotation mark"):
        cloud_hypervisor.arguments([handed_socket("vfio-user", '/run/".sock')])


@pytest.mark.parametrize("path", ["", "/run/a\nb", "/run/\x1b[31m", "/" + 107 * "x"])
def test_what_cannot_be_a_sockets_path_is_bad_usage(path: str) -> None:
    with pytest.raises(UsageError, match="socket's path"):
        handed_socket("vfio-user", path)
    assert handed_socket("vfio-user", "/" + 106 * "x").path


def test_a_socket_serves_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    """The second of them was left out of the virtual machine, without a word."""
    line = ["--root", str(HOSTS / "shared-group"), "vm", "qemu", "vhost-user-blk:/run/x"]
    assert main([*line, "vhost-user-net:/run/x"]) == 2
    assert "cannot be both vhost-user-blk and vhost-user-net" in capsys.readouterr().err
    assert main([*line, "vhost-user-blk:/run/../run/x"]) == 0
    assert capsys.readouterr().out.count("-chardev") == 1


def test_options_that_a_substitution_would_not_read_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`$(…)` splits at spaces and keeps quotes; vfio-user's JSON has to be quoted in any case."""
    root = ["--root", str(HOSTS / "shared-group"), "vm"]
    assert main([*root, "qemu", "vhost-user-blk:/run/x.sock"]) == 0
    assert "eval" not in capsys.readouterr().err
    for words in (["qemu", "vfio-user:/run/x"], ["cloud-hypervisor", "vfio-user:/run/a b"]):
        assert main([*root, *words]) == 0
        shown = capsys.readouterr()
        assert 'eval "' in shown.err and "\n" not in shown.out.strip()
        assert main([*root, *words, "-q"]) == 0
        assert "eval" not in capsys.readouterr().err


@pytest.mark.parametrize("virtio", [None, "fs"])
def test_libvirt_is_told_of_no_vdpa_device_whose_type_it_does_not_take(virtio: str | None) -> None:
    """One of an unknown type was an interface, whatever it was."""
    with pytest.raises(Unsupported, match="takes vDPA networks and disks"):
        libvirt.hostdevs([replace(NET, virtio=virtio)])


def test_a_machine_without_pci_express_gets_no_root_ports() -> None:
    """pseries has pci.0 alone: there is no bus pcie.0 to put a root port on."""
    words = qemu.arguments([*GPU, DISK, USER], guest=machine_of("ppc64"))
    line = " ".join(words)
    assert "pcie" not in line and "vfio-rp" not in line
    places = [word for word in words if "bus=pci.0" in word]
    assert [place.partition("bus=")[2] for place in places] == [
        "pci.0,addr=0x1b.0,multifunction=on",
        "pci.0,addr=0x1b.1",
        "pci.0,addr=0x1a",
    ]
    assert (json.loads(words[-1])["bus"], json.loads(words[-1])["addr"]) == ("pci.0", "0x19")
    assert "addr=0x1b" in " ".join(qemu.arguments(GPU, guest=machine_of("arm64")))


def test_more_cards_than_a_root_bus_has_places_for_are_refused() -> None:
    cards = [function(f"0000:{bus:02x}:00.0") for bus in range(129)]
    assert len(qemu.arguments(cards[:128])) == 4 * 128
    with pytest.raises(Unsupported, match="places for 128 cards"):
        qemu.arguments(cards)
    with pytest.raises(Unsupported, match="pseries has places for 26 cards"):
        qemu.arguments(cards[:27], guest=machine_of("ppc64"))


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
        "path=/dev/vhost-vdpa-0,num_queues=2",
        "--disk",
        "vhost_user=on,socket=/run/vm1.sock",
        "--net",
        "vhost_user=on,socket=/run/net1.sock",
        "--user-device",
        "socket=/run/edu.sock",
    ]


def test_cloud_hypervisor_is_told_of_all_queues_of_a_vdpa_device() -> None:
    """Its guest's driver asks for the queue of the control, and fails where there is none."""
    words = cloud_hypervisor.arguments([replace(NET, queues=3), replace(BLOCK, queues=4)])
    assert words[3:] == [
        "path=/dev/vhost-vdpa-0,num_queues=3",
        "path=/dev/vhost-vdpa-1,num_queues=4",
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
    # 0x09 to 0x1e of the root bus are Proxmox's own; its sound device is at 1b.0.
    assert "addr=0x8.0," in lines[3] and "addr=0x1b" not in lines[3]
    assert "sysfsdev=/sys/bus/pci/devices/10000:e1:00.0" in lines[3]
    with pytest.raises(Unsupported, match="takes 16"):
        proxmox.lines([function(f"0000:{bus:02x}:00.0") for bus in range(1, 18)])


def test_what_goes_to_qemu_by_proxmox_comes_with_the_machine_and_the_memory_it_needs() -> None:
    lines = proxmox.lines([ODD])
    assert lines[:2] == ["machine: q35", "memory: 1024"]
    words = shlex.split(lines[2].removeprefix("args: "))
    assert "-m" not in words
    assert "memory-backend-memfd,id=vfiotool-mem,size=1024M,share=on" in words
    assert "socket,id=vhost-user-blk0-chr,path=/run/a,, b'[1]<&>.sock" in words
    assert proxmox.lines([WIDE])[0] == "machine: q35"


def test_one_card_with_vgas_registers_is_the_display_of_a_proxmox_machine() -> None:
    second = function("0000:02:00.0", class_code="030000")
    virtual = function("0000:00:02.1", class_code="030000", physfn="0000:00:02.0")
    lines = proxmox.lines([virtual, *GPU, second])
    assert [line.partition(",")[2] for line in lines[1:]] == ["pcie=1", "pcie=1,x-vga=1", "pcie=1"]


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
        f"*--dry-run*) ;; bind*) touch {tmp_path}/bound ;; esac\n"
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
    other = " --hypervisor cloud-hypervisor" if kind == "cloud-hypervisor" else ""
    assert lines[:5] == [
        "vfiotool vm check 0000:01:00.0",
        "vfiotool bind 0000:01:00.0 --dry-run --json",
        "vfiotool bind 0000:01:00.0",
        "vfiotool vm check 0000:01:00.1",
        f"vfiotool vm check 0000:01:00.0 0000:01:00.1{other} --memory 2G --vcpus 4",
    ]
    assert lines[5].startswith("run ") and lines[5].endswith("-kernel my kernel")
    assert lines[6:] == ["vfiotool release 0000:01:00.0"]


@pytest.mark.parametrize("when", ["bind", "run"])
def test_a_script_that_is_told_to_end_ends_its_machine_and_gives_back_all(
    when: str, tmp_path: Path
) -> None:
    """SIGTERM to the shell alone; the release of the first device fails."""
    calls = tmp_path / "calls"
    hit = f"[ -e {tmp_path}/hit ] || {{ touch {tmp_path}/hit; kill -TERM $PPID; }}"
    (tmp_path / "vfiotool").write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n'
        f'case "$*" in "vm check "*.?) exit 1 ;; *--dry-run*) ;;\n'
        f"bind*) {hit if when == 'bind' else ':'} ;;\n"
        '"release 0000:01:00.0") exit 5 ;; esac\n'
    )
    machine = (
        f"#!{sys.executable}\nimport os, pathlib, signal, sys\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "def end(*_):\n"
        "    with calls.open('a') as file: file.write('machine ends\\n')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "with calls.open('a') as file: file.write(sys.stdin.readline())\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while True: signal.pause()\n"
    )
    (tmp_path / "qemu-system-x86_64").write_text(machine)
    for name in ("vfiotool", "qemu-system-x86_64"):
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "start"
    script.write_text(start_script("qemu", GPU, ["-m", "2G"], memory="2G", vcpus=1))
    done = subprocess.run(
        ["sh", str(script)],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        input="typed\n",
        text=True,
        timeout=60,
    )
    lines = calls.read_text().splitlines()
    bound = [line.split()[1] for line in lines if line.startswith("bind") and "--dry" not in line]
    released = [line.split()[1] for line in lines if line.startswith("release")]
    assert bound == released == ([d.name for d in GPU] if when == "run" else [GPU[0].name])
    assert done.returncode == 5
    if when == "run":
        assert lines[-4:-2] == ["typed", "machine ends"]


def test_a_name_in_a_scripts_comment_is_no_command() -> None:
    device = replace(NET, name="vdpa0\ntouch /tmp/x")
    text = start_script("qemu", [device], [], memory="2G", vcpus=1)
    assert "\ntouch" not in text.partition("set -eu")[0]


def test_a_script_leaves_what_was_bound_before_although_it_is_not_ready(tmp_path: Path) -> None:
    """Its group is not viable yet, or its token is not known: bind has nothing to do for it."""
    calls = tmp_path / "calls"
    nothing = {"format_version": "1.0", "steps": [], "in_sync": True, "notes": []}
    (tmp_path / "vfiotool").write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n'
        f"case \"$*\" in *--dry-run*) echo '{json.dumps(nothing, indent=2)}' ;;\n"
        "vm*) exit 1 ;; esac\n"
    )
    (tmp_path / "vfiotool").chmod(0o755)
    script = tmp_path / "start"
    script.write_text(start_script("qemu", GPU[:1], [], memory=None, vcpus=1))
    done = subprocess.run(["sh", str(script)], env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 1
    assert calls.read_text().splitlines() == [
        "vm check 0000:01:00.0",
        "bind 0000:01:00.0 --dry-run --json",
        "vm check 0000:01:00.0",
    ]


def test_a_script_checks_what_it_starts() -> None:
    """A VF behind a guard is never ready without its token: it was bound anew, and released."""
    guarded = replace(vf(), guard="0000:03:00.0")
    text = start_script(
        "qemu", [guarded, *GPU], [], memory="2G", vcpus=1, iommufd=True, vf_token=UUID
    )
    assert f"vm check 0000:03:10.0 --vf-token {UUID} >/dev/null" in text
    assert "vm check 0000:01:00.0 >/dev/null" in text
    assert f"0000:01:00.1 --vf-token {UUID} --iommufd --memory 2G --vcpus 1 >&2" in text


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
