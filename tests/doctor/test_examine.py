"""The doctor on hosts in memory and on folders laid out like a root."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.doctor.claims import read_claims
from vfiotool.doctor.examine import Diagnosis, Finding, examine, judge
from vfiotool.doctor.facts import read_facts
from vfiotool.host.distribution import Distribution, read_distribution
from vfiotool.host.host import Host

NIC = "0000:03:00.0"
MEMLOCK = "Max locked memory         {0}              {0}              bytes"


@pytest.fixture
def small() -> SmallHost:
    """A host on which everything is right."""
    small = SmallHost()
    small.function("0000:00:01.0", group=3)
    small.file("/sys/firmware/acpi/tables/DMAR", "")
    small.file("/proc/cmdline", "quiet intel_iommu=on")
    small.file("/proc/interrupts", " 31: 0 IR-PCI-MSI 0-edge x")
    small.file("/proc/sys/kernel/osrelease", "6.12.0")
    for module in ("vfio", "vfio_pci", "vfio_iommu_type1", "iommufd"):
        small.file(f"/sys/module/{module}/initstate", "live")
    small.file("/dev/iommu", "")
    small.file("/dev/kvm", "")
    small.folders.add("/sys/class/vfio-dev")
    small.file("/proc/self/limits", MEMLOCK.format("unlimited"))
    small.file("/etc/os-release", 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12"')
    small.file("/etc/default/grub", "")
    return small


def diagnose(small: SmallHost) -> Diagnosis:
    host = small.host()
    return examine(host, read_inventory(host))


def finding(small: SmallHost, check: str) -> Finding:
    (found,) = [entry for entry in diagnose(small).findings if entry.check == check]
    return found


def test_a_host_on_which_all_is_right_is_ready(small: SmallHost) -> None:
    diagnosis = diagnose(small)
    assert diagnosis.ready
    assert {entry.severity for entry in diagnosis.findings} == {"ok"}
    assert diagnosis.distribution == "Debian GNU/Linux 12"


def no_iommu(small: SmallHost, *, firmware: bool, cmdline: str) -> None:
    small.folders.discard("/sys/class/iommu/dmar0")
    small.links = {path: to for path, to in small.links.items() if "iommu" not in path}
    small.files = {path: data for path, data in small.files.items() if "iommu_groups" not in path}
    if not firmware:
        del small.files["/sys/firmware/acpi/tables/DMAR"]
        small.folders.add("/sys/firmware/acpi/tables")
    small.file("/proc/cmdline", cmdline)


def severities(small: SmallHost) -> tuple[str, ...]:
    checks = ("iommu-firmware", "iommu-option", "iommu-effect")
    return tuple(finding(small, check).severity for check in checks)


def test_firmware_option_and_effect_are_told_apart(small: SmallHost) -> None:
    no_iommu(small, firmware=False, cmdline="quiet intel_iommu=on")
    assert severities(small) == ("blocker", "ok", "blocker")
    assert not diagnose(small).ready


def test_a_forgotten_kernel_option_is_named_with_the_commands_to_type(small: SmallHost) -> None:
    no_iommu(small, firmware=True, cmdline="quiet")
    assert severities(small) == ("ok", "blocker", "blocker")
    assert finding(small, "iommu-option").remedy[1:] == ("update-grub", "reboot")


@pytest.mark.parametrize("word", ["intel_iommu=off", "amd_iommu=off", "iommu=off"])
def test_an_iommu_that_was_switched_off(small: SmallHost, word: str) -> None:
    no_iommu(small, firmware=True, cmdline=f"quiet {word}")
    assert finding(small, "iommu-option").summary.endswith(f"({word})")
    assert severities(small) == ("ok", "blocker", "blocker")


def test_an_option_that_is_none_is_a_note(small: SmallHost) -> None:
    small.file("/proc/cmdline", "amd_iommu=on")
    assert finding(small, "iommu-option").severity == "note"
    assert diagnose(small).ready


def test_an_iommu_without_an_acpi_table_is_believed_by_its_effect(small: SmallHost) -> None:
    del small.files["/sys/firmware/acpi/tables/DMAR"]
    assert severities(small) == ("ok", "ok", "ok")


def test_a_virtio_iommu_whose_driver_is_not_loaded(small: SmallHost) -> None:
    no_iommu(small, firmware=False, cmdline="quiet")
    small.file("/sys/firmware/acpi/tables/VIOT", "")
    assert finding(small, "iommu-effect").remedy[0] == "modprobe virtio_iommu"
    small.file("/lib/modules/6.12.0/modules.builtin", "")
    assert finding(small, "iommu-effect").remedy[0] == "a kernel with CONFIG_VIRTIO_IOMMU"
    small.file("/lib/modules/6.12.0/kernel/drivers/iommu/virtio-iommu.ko.xz", "")
    assert finding(small, "iommu-effect").remedy[0] == "modprobe virtio_iommu"


def test_noiommu_groups_are_no_effect(small: SmallHost) -> None:
    small.folders.discard("/sys/class/iommu/dmar0")
    small.file("/sys/kernel/iommu_groups/3/name", "vfio-noiommu")
    assert "all are no-IOMMU groups" in finding(small, "iommu-effect").summary


def test_interrupt_remapping_in_its_three_states(small: SmallHost) -> None:
    small.file("/proc/interrupts", " 31: 0 PCI-MSI 0-edge x")
    small.file("/proc/cmdline", "intel_iommu=on intremap=off")
    absent = finding(small, "interrupt-remapping")
    assert absent.severity == "blocker"
    assert absent.remedy == (
        "remove intremap=off from the kernel's command line in /etc/default/grub",
        "update-grub",
        "reboot",
        absent.remedy[-1],
    )
    small.file("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")
    assert finding(small, "interrupt-remapping").severity == "warning"
    small.file("/proc/interrupts", " 31: 0 XT-PIC 0-edge x")
    assert finding(small, "interrupt-remapping").severity == "note"


def test_a_module_is_loaded_built_in_available_or_absent(small: SmallHost) -> None:
    del small.files["/sys/module/vfio_pci/initstate"]
    assert finding(small, "module-vfio-pci").severity == "note"
    small.file("/lib/modules/6.12.0/modules.builtin", "kernel/drivers/vfio/vfio.ko")
    absent = finding(small, "module-vfio-pci")
    assert (absent.severity, absent.remedy) == ("blocker", ("a kernel with CONFIG_VFIO_PCI",))
    path = "/lib/modules/6.12.0/kernel/drivers/vfio/pci/vfio-pci.ko.zst"
    small.file(path, "")
    there = finding(small, "module-vfio-pci")
    assert (there.severity, there.evidence) == ("note", path)
    assert there.remedy[0] == "modprobe vfio-pci"
    small.file("/lib/modules/6.12.0/modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko")
    built_in = finding(small, "module-vfio-pci")
    assert built_in.severity == "ok"
    assert "built in: modprobe.d does not reach it" in built_in.summary


def test_without_iommufd_the_group_interface_does(small: SmallHost) -> None:
    del small.files["/dev/iommu"]
    small.file("/dev/vfio/vfio", "")
    assert finding(small, "backends").severity == "note"
    assert diagnose(small).ready


def test_a_low_memory_lock_limit_warns_unless_the_process_is_exempt(small: SmallHost) -> None:
    small.file("/proc/self/limits", MEMLOCK.format(8 << 20))
    assert finding(small, "memory-lock").severity == "warning"
    assert "8 MiB" in finding(small, "memory-lock").summary
    small.file("/proc/self/status", "CapEff:\t0000000000004000")
    assert finding(small, "memory-lock").severity == "ok"
    small.file("/proc/self/status", "CapEff:\t0000000000003fff")
    assert finding(small, "memory-lock").severity == "warning"


def test_huge_pages_are_told_for_each_node(small: SmallHost) -> None:
    for node, count in (("node0", 512), ("node1", 0)):
        base = f"/sys/devices/system/node/{node}/hugepages/hugepages-2048kB"
        small.file(f"{base}/nr_hugepages", str(count))
        small.file(f"{base}/free_hugepages", str(count))
    first, second = [entry for entry in diagnose(small).findings if entry.check == "hugepages"]
    assert (first.severity, "512 of 2 MiB (512 free)" in first.summary) == ("ok", True)
    assert (second.severity, second.summary.startswith("node1")) == ("note", True)


@pytest.mark.parametrize(
    "path",
    [
        "vfio/parameters/enable_unsafe_noiommu_mode",
        "vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        "iommufd/parameters/allow_unsafe_interrupts",
        "vfio_pci/parameters/disable_denylist",
    ],
)
def test_unsafe_options_warn(small: SmallHost, path: str) -> None:
    small.file(f"/sys/module/{path}", "N")
    assert finding(small, "unsafe-option").severity == "ok"
    small.file(f"/sys/module/{path}", "Y")
    unsafe = finding(small, "unsafe-option")
    assert (unsafe.severity, unsafe.evidence) == ("warning", f"/sys/module/{path} is Y")


def test_an_acs_override_warns(small: SmallHost) -> None:
    small.file("/proc/cmdline", "intel_iommu=on pcie_acs_override=downstream,multifunction")
    assert "groups look smaller" in finding(small, "unsafe-option").summary


def test_lockdown_is_a_note(small: SmallHost) -> None:
    small.file("/sys/kernel/security/lockdown", "none [integrity] confidentiality")
    assert finding(small, "lockdown").severity == "note"
    small.file("/sys/kernel/security/lockdown", "[none] integrity confidentiality")
    assert "lockdown" not in {entry.check for entry in diagnose(small).findings}


def test_findings_follow_from_the_facts_alone(small: SmallHost) -> None:
    host = small.host()
    facts = read_facts(host, read_inventory(host))
    assert judge(facts) == diagnose(small)
    without = judge(replace(facts, kvm="absent"))
    assert [entry.check for entry in without.findings if entry.severity != "ok"] == ["kvm"]


def test_nothing_of_a_kernel_known_is_one_note_to_a_person(small: SmallHost) -> None:
    for module in ("vfio", "vfio_pci", "vfio_iommu_type1", "iommufd"):
        del small.files[f"/sys/module/{module}/initstate"]
    diagnosis = diagnose(small)
    notes = [note.summary for note in diagnosis.for_people() if "this kernel has" in note.summary]
    assert notes == [
        "whether this kernel has vfio, vfio-pci, vfio_iommu_type1, iommufd cannot be told here"
    ]
    assert len([entry for entry in diagnosis.findings if "module-" in entry.check]) == 4
    assert diagnosis.ready


def test_a_page_is_named_once() -> None:
    pages = [entry.page for entry in diagnose(SmallHost()).for_people() if entry.page]
    assert len(pages) == len(set(pages)) > 1


@pytest.mark.parametrize(
    ("release", "architecture", "kvm"),
    [
        ("5.14.0-427.el9.s390x", "IBM Z", "modprobe kvm"),
        ("6.1.0-9-powerpc64le", "POWER", "modprobe kvm_hv"),
    ],
)
def test_an_architecture_that_always_has_an_iommu(
    small: SmallHost, release: str, architecture: str, kvm: str
) -> None:
    small.file("/proc/sys/kernel/osrelease", release)
    small.folders.discard("/sys/class/iommu/dmar0")
    del small.files["/sys/firmware/acpi/tables/DMAR"]
    small.file("/proc/interrupts", " 31: 0 QDIO")
    small.file("/sys/module/vfio_iommu_spapr_tce/initstate", "live")
    del small.files["/dev/kvm"]
    diagnosis = diagnose(small)
    assert diagnosis.ready
    said = " ".join(entry.summary for entry in diagnosis.findings)
    assert f"{architecture} has an IOMMU in every machine" in said
    assert finding(small, "kvm").remedy == (kvm,)


def test_the_its_of_arm64_isolates_interrupts(small: SmallHost) -> None:
    small.file("/proc/interrupts", " 25: 100 ITS-MSI 134742016 Edge mlx5_async0")
    assert finding(small, "interrupt-remapping").severity == "ok"


def test_firmware_tables_that_cannot_be_listed_are_unknown(small: SmallHost) -> None:
    no_iommu(small, firmware=False, cmdline="quiet")
    small.folders.discard("/sys/firmware/acpi/tables")
    assert finding(small, "iommu-firmware").severity == "note"
    assert finding(small, "iommu-effect").severity == "blocker"


def test_an_option_that_only_a_leftover_file_has_is_pointed_out(small: SmallHost) -> None:
    no_iommu(small, firmware=True, cmdline="initrd=\\EFI\\x quiet")
    small.file("/etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet intel_iommu=on"')
    small.file("/etc/kernel/cmdline", "quiet")
    option = finding(small, "iommu-option")
    assert "/etc/default/grub has it" in option.evidence
    assert option.remedy[0] == "sed -i '1s/$/ intel_iommu=on/' /etc/kernel/cmdline"


DISTRIBUTIONS = [
    ("ID=ubuntu\nID_LIKE=debian", ["/etc/default/grub"], "debian", "grub", "update-grub"),
    (
        "ID=debian",
        ["/etc/kernel/proxmox-boot-uuids"],
        "debian",
        "proxmox",
        "proxmox-boot-tool refresh",
    ),
    ("ID=fedora", ["/usr/sbin/grubby", "/etc/default/grub"], "fedora", "grubby", "grubby"),
    (
        'ID="rocky"\nID_LIKE="rhel centos fedora"',
        ["/usr/sbin/grubby"],
        "fedora",
        "grubby",
        "grubby",
    ),
    ("ID=arch", ["/etc/default/grub"], "arch", "grub", "grub-mkconfig -o /boot/grub/grub.cfg"),
    ("ID=arch", ["/boot/loader/entries/arch.conf"], "arch", "systemd-boot", "/boot/loader/entries"),
    ("ID=arch", ["/etc/kernel/cmdline"], "arch", "systemd-boot", "mkinitcpio -P"),
    ("ID=gentoo", ["/etc/default/grub"], "gentoo", "grub", "grub-mkconfig -o /boot/grub/grub.cfg"),
    ("ID=alpine", ["/etc/default/grub"], "alpine", "grub", "grub-mkconfig -o /boot/grub/grub.cfg"),
    ("ID=alpine", ["/etc/update-extlinux.conf"], "alpine", "extlinux", "update-extlinux"),
    ("ID=nixos", ["/boot/loader/entries/nixos.conf"], "nixos", "nixos", "nixos-rebuild boot"),
    ("ID=pop", ["/etc/kernelstub/configuration"], "debian", "kernelstub", "kernelstub -a"),
    ("ID=fedora", ["/run/ostree-booted", "/usr/sbin/grubby"], "fedora", "ostree", "rpm-ostree"),
    ("ID=fedora", [], "fedora", "grubby", "grubby --update-kernel=ALL"),
    (
        "ID=fedora",
        ["/usr/bin/bash", "/etc/default/grub"],
        "fedora",
        "grub",
        "grub2-mkconfig -o /boot/grub2/grub.cfg --update-bls-cmdline",
    ),
    (
        'ID="opensuse-microos"\nID_LIKE="suse opensuse"',
        ["/etc/default/grub"],
        "suse",
        "grub",
        "transactional-update grub.cfg",
    ),
    ("ID=arch", ["/boot/refind_linux.conf"], "arch", "refind", "/boot/refind_linux.conf"),
    (
        'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"',
        ["/etc/default/grub"],
        "suse",
        "grub",
        "grub2-mkconfig -o /boot/grub2/grub.cfg",
    ),
]


@pytest.mark.parametrize(("release", "files", "family", "loader", "words"), DISTRIBUTIONS)
def test_the_remedy_is_this_distributions(
    release: str, files: list[str], family: str, loader: str, words: str
) -> None:
    small = SmallHost()
    small.file("/etc/os-release", release)
    for path in files:
        small.file(path, "")
    found = read_distribution(small.host())
    assert (found.family, found.loader) == (family, loader)
    commands = found.kernel_option("intel_iommu=on")
    assert words in commands[-1]
    assert any("intel_iommu=on" in command for command in commands)


@pytest.mark.parametrize(
    ("cmdline", "loader"),
    [
        ("BOOT_IMAGE=/boot/vmlinuz quiet", "proxmox-grub"),
        ("initrd=\\EFI\\proxmox\\initrd.img quiet", "proxmox"),
    ],
)
def test_the_loader_that_booted_counts_and_not_the_file_that_lies_about(
    cmdline: str, loader: str
) -> None:
    small = SmallHost()
    small.file("/etc/os-release", "ID=debian")
    for path in ("/etc/kernel/proxmox-boot-uuids", "/etc/default/grub", "/etc/kernel/cmdline"):
        small.file(path, "quiet")
    small.file("/proc/cmdline", cmdline)
    found = read_distribution(small.host())
    assert found.loader == loader
    assert found.kernel_option("x=1")[-1] == "proxmox-boot-tool refresh"


def test_generated_entries_are_made_anew_from_the_command_line(tmp_path: Path) -> None:
    """Editing them by hand lasts until the next kernel."""
    import subprocess

    small = SmallHost()
    small.file("/etc/os-release", "ID=debian")
    entry = "title Debian\nmachine-id 0123456789abcdef0123456789abcdef\noptions quiet"
    small.file("/boot/loader/entries/0123-6.1.conf", entry)
    add, refresh = read_distribution(small.host()).kernel_option("intel_iommu=on")
    assert refresh == "kernel-install add-all"
    (tmp_path / "cmdline").write_text("initrd=\\x\\initrd root=/dev/vda quiet\n")
    paths = (("/proc/cmdline", "cmdline"), ("/etc/kernel/cmdline", "made"))
    for path, name in paths:
        add = add.replace(path, str(tmp_path / name))
    subprocess.run(add, shell=True, check=True)
    assert (tmp_path / "made").read_text().split() == ["root=/dev/vda", "quiet", "intel_iommu=on"]


@pytest.mark.parametrize(
    "text",
    [
        'GRUB_CMDLINE_LINUX="rhgb quiet"\n',
        "GRUB_CMDLINE_LINUX_DEFAULT='quiet'\n",
        'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
        '#GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_TIMEOUT=3\n',
    ],
)
def test_the_command_for_grub_works_on_the_file_as_it_is(tmp_path: Path, text: str) -> None:
    import subprocess

    small = SmallHost()
    small.file("/etc/os-release", "ID=arch")
    small.files["/etc/default/grub"] = text.encode()
    edit = read_distribution(small.host()).kernel_option("intel_iommu=on")[0]
    grub = tmp_path / "grub"
    grub.write_text(text)
    subprocess.run(edit.replace("/etc/default/grub", str(grub)), shell=True, check=True)
    sourced = f". {grub}; echo $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
    done = subprocess.run(sourced, shell=True, check=True, capture_output=True, text=True)
    words = done.stdout.split()
    assert "intel_iommu=on" in words
    assert ("quiet" in words) == (not text.startswith("#"))


def test_an_unknown_distribution_gets_a_sentence_and_no_wrong_command() -> None:
    found = read_distribution(SmallHost().host())
    assert found == Distribution("unknown distribution", "unknown", "unknown")
    assert found.kernel_option("x=1")[0].startswith("add x=1 to the kernel's command line")
    assert found.module_option("vfio-pci", "a=1")[-1].endswith("/etc/modprobe.d/vfio.conf")


def test_the_debian_command_appends_to_what_grub_has(tmp_path: Path) -> None:
    """The commands are typed as they stand: run the one that edits files, in a folder."""
    import subprocess

    small = SmallHost()
    small.file("/etc/os-release", "ID=arch")
    small.file("/etc/default/grub", "")
    edit = read_distribution(small.host()).kernel_option("intel_iommu=on")[0]
    grub = tmp_path / "grub"
    grub.write_text('GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet splash"\n')
    subprocess.run(edit.replace("/etc/default/grub", str(grub)), shell=True, check=True)
    assert 'GRUB_CMDLINE_LINUX_DEFAULT="intel_iommu=on quiet splash"' in grub.read_text()


LIBVIRT = """<domain type='kvm'><name>win</name><devices>
<hostdev mode='subsystem' type='pci' managed='yes'><source>
<address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>
<address type='pci' domain='0x0000' bus='0x06' slot='0x00' function='0x0'/></hostdev>
<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>
<address uuid='83B8F4F2-509f-382f-3c1e-e6bfe0fa1001'/></source></hostdev>
<graphics type='vnc' passwd='hunter2'/></devices></domain>"""
FILES = {
    "/etc/NetworkManager/system-connections/up.nmconnection": "[connection]\nid=up\n"
    "interface-name=ens1f0\n[wifi-security]\npsk=hunter2\n[sriov]\ntotal-vfs=4\n",
    "/etc/NetworkManager/system-connections/plain.nmconnection": "[connection]\nid=plain\n",
    "/etc/systemd/network/10-pf.link": "[Match]\nPath=pci-0000:03:00.0\n[Link]\n"
    "SR-IOVVirtualFunctions=2\n",
    "/usr/lib/systemd/network/10-pf.link": "[Match]\nMACAddress=aa:bb\n[Link]\n"
    "SR-IOVVirtualFunctions=9\n",
    "/etc/netplan/01.yaml": "network:\n  ethernets:\n    ens1f0:\n      dhcp4: true\n"
    "      virtual-function-count: 8\n    other:\n      dhcp4: true\n",
    "/etc/driverctl.d/pci-0000:03:00.0": "vfio-pci\n",
    "/etc/mdevctl.d/0000:00:02.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001": json.dumps(
        {"mdev_type": "i915-GVTg_V5_4", "start": "auto", "attrs": []}
    ),
    "/etc/mdevctl.d/0000:00:02.0/broken": "{",
    "/etc/modprobe.d/gpu.conf": "# x\noptions vfio_pci ids=10de:2684,10DE:22BA:1:2 disable_vga=1\n",
    "/etc/libvirt/qemu/win.xml": LIBVIRT,
    "/etc/vfiotool/boot/policy.toml": '[[device]]\nmatch = { address = "0000:03:00.0" }\n'
    'driver = "vfio-pci"\n[[device]]\nmatch = { id = "10DE:2684" }\ndriver = "vfio-pci"\n',
    "/etc/libvirt/qemu/autostart/win.xml": LIBVIRT,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sys").mkdir()
    for path, text in FILES.items():
        target = tmp_path / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return tmp_path


def test_the_claims_of_all_tools_are_read(root: Path) -> None:
    claims = {
        (claim.tool, claim.device, claim.setting) for claim in read_claims(Host.at(str(root)))
    }
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    assert claims == {
        ("NetworkManager", "interface:ens1f0", "sriov total-vfs=4"),
        ("systemd.link", "path:pci-0000:03:00.0", "SR-IOVVirtualFunctions=2"),
        ("netplan", "interface:ens1f0", "virtual-function-count=8"),
        ("driverctl", "pci:0000:03:00.0", "driver=vfio-pci"),
        ("mdevctl", f"mdev:{uuid}", "i915-GVTg_V5_4 of 0000:00:02.0, start=auto"),
        ("modprobe.d", "id:10de:2684", "vfio-pci ids="),
        ("modprobe.d", "id:10de:22ba", "vfio-pci ids="),
        ("vfiotool", "pci:0000:03:00.0", "driver=vfio-pci"),
        ("vfiotool", "id:10de:2684", "driver=vfio-pci"),
        ("libvirt", "pci:0000:03:00.0", "domain win, managed, started at boot"),
        ("libvirt", f"mdev:{uuid}", "domain win, started at boot"),
    }


def test_no_password_of_another_tools_file_leaves_it(root: Path) -> None:
    from vfiotool.host.paths import OTHER_TOOLS

    assert "hunter2" not in (Host.at(str(root)).read(OTHER_TOOLS) or "")


def claimed(small: SmallHost, *claims: str) -> None:
    small.file("/proc/vfiotool/other-tools", "\n".join(claims))


def test_two_tools_that_want_one_device_conflict(small: SmallHost) -> None:
    small.function(NIC, group=4, class_code="020000")
    claimed(small, f"driverctl\t/etc/driverctl.d/pci-{NIC}\tpci:{NIC}\tdriver=vfio-pci")
    assert finding(small, "conflict").severity == "ok"
    claimed(
        small,
        f"driverctl\t/etc/driverctl.d/pci-{NIC}\tpci:{NIC}\tdriver=vfio-pci",
        f"libvirt\t/etc/libvirt/qemu/win.xml\tpci:{NIC}\tdomain win, managed",
    )
    conflict = finding(small, "conflict")
    assert conflict.severity == "warning"
    assert conflict.summary.startswith(f"{NIC} is claimed by several tools: driverctl (driver=")
    assert conflict.evidence == f"/etc/driverctl.d/pci-{NIC}, /etc/libvirt/qemu/win.xml"


def test_tools_that_agree_do_not_conflict(small: SmallHost) -> None:
    small.function(NIC, group=4)
    claimed(
        small,
        f"driverctl\t/etc/driverctl.d/pci-{NIC}\tpci:{NIC}\tdriver=vfio-pci",
        f"libvirt\t/etc/libvirt/qemu/win.xml\tpci:{NIC}\tdomain win",
    )
    assert finding(small, "conflict").severity == "ok"


def test_the_same_option_said_twice_is_no_conflict(small: SmallHost) -> None:
    small.function(NIC, group=4, identity="10de:2684")
    claimed(small, "modprobe.d\t/etc/modprobe.d/x.conf\tid:10de:2684\tvfio-pci ids=")
    small.file("/proc/cmdline", "intel_iommu=on vfio-pci.ids=10de:2684")
    assert finding(small, "conflict").severity == "ok"


def test_claims_on_absent_devices_are_no_conflict(small: SmallHost) -> None:
    claimed(
        small,
        "driverctl\ta\tpci:0000:7f:00.0\tdriver=vfio-pci",
        "libvirt\tb\tpci:0000:7f:00.0\tdomain win, managed",
    )
    assert finding(small, "conflict").severity == "ok"


def test_a_foreign_manager_of_vfs_is_reported_for_its_function(small: SmallHost) -> None:
    small.network(NIC, "ens1f0")
    claimed(
        small,
        "NetworkManager\t/etc/NetworkManager/x.nmconnection\tinterface:ens1f0\tsriov total-vfs=4",
        "systemd.link\t/etc/systemd/network/y.link\tinterface:gone\tSR-IOVVirtualFunctions=2",
    )
    first, second = [entry for entry in diagnose(small).findings if entry.check == "vf-manager"]
    assert (first.severity, NIC in first.summary) == ("warning", True)
    assert (second.severity, "not present" in second.summary) == ("note", True)


def test_an_ids_option_that_takes_several_devices_warns(small: SmallHost) -> None:
    for address in ("0000:03:00.0", "0000:04:00.0"):
        small.function(address, group=4, identity="10de:2684")
    small.file("/proc/cmdline", "intel_iommu=on vfio-pci.ids=10DE:2684")
    greedy = finding(small, "ids-option")
    assert greedy.severity == "warning"
    assert greedy.summary.endswith("10de:2684: 0000:03:00.0, 0000:04:00.0")


def test_every_blocker_has_a_remedy(
    small: SmallHost,
) -> None:
    no_iommu(small, firmware=False, cmdline="iommu=off")
    del small.files["/sys/module/vfio_pci/initstate"]
    small.file("/lib/modules/6.12.0/modules.builtin", "")
    blockers = [entry for entry in diagnose(small).findings if entry.severity == "blocker"]
    assert len(blockers) == 4
    assert all(entry.remedy for entry in blockers)


@pytest.mark.parametrize("state", ["no IOMMU", "nothing known", "no module loaded"])
def test_every_finding_that_is_not_ok_has_evidence_and_a_page(small: SmallHost, state: str) -> None:
    if state == "no IOMMU":
        no_iommu(small, firmware=False, cmdline="iommu=off")
    if state == "nothing known":
        small = SmallHost()
    if state == "no module loaded":
        del small.files["/sys/module/vfio_pci/initstate"]
        small.file("/lib/modules/6.12.0/kernel/drivers/vfio/pci/vfio-pci.ko", "")
        del small.files["/dev/kvm"]
    found = [entry for entry in diagnose(small).findings if entry.severity != "ok"]
    assert found
    for entry in found:
        assert entry.evidence
        assert (entry.page or "").startswith("https://"), entry.check


def test_every_check_is_documented(small: SmallHost) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "why.md").read_text()
    small.file("/sys/kernel/security/lockdown", "[integrity]")
    checks = {entry.check for entry in diagnose(small).findings}
    checks |= {"hugepages", "vf-manager", "ids-option"}
    assert [check for check in sorted(checks) if f"`{check}`" not in page] == []


def test_the_command_prints_json_and_exits_1_on_a_blocker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sys").mkdir()
    assert main(["--root", str(tmp_path), "--json", "doctor"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["format_version"] == "1.0"
    assert answer["ready"] is False
    assert {"check", "severity", "summary", "evidence", "remedy", "page"} == set(
        answer["findings"][0]
    )


def test_the_command_for_people_puts_blockers_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sys").mkdir()
    assert main(["--root", str(tmp_path), "doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": not ready")
    assert lines[1].startswith("blocker")


def test_huge_pages_are_offered_in_a_number_that_a_machine_has(small: SmallHost) -> None:
    for size in ("524288kB", "64kB"):
        base = f"/sys/devices/system/node/node0/hugepages/hugepages-{size}"
        small.file(f"{base}/nr_hugepages", "0")
        small.file(f"{base}/free_hugepages", "0")
    (remedy,) = finding(small, "hugepages").remedy
    assert remedy.startswith("echo 32768 > ") and "hugepages-64kB" in remedy


def test_locked_memory_is_not_given_to_everybody(small: SmallHost) -> None:
    small.file("/proc/self/limits", MEMLOCK.format(8 << 20))
    assert "'* " not in " ".join(finding(small, "memory-lock").remedy)
