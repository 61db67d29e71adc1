"""`vm check`: each finding from a host that has the fault, with its number, and gone without it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.errors import UsageError
from vfiotool.snapshot.capture import capture, save
from vfiotool.snapshot.load import open_root
from vfiotool.vm import preflight
from vfiotool.vm.card import judge_card
from vfiotool.vm.facts import ReadyCheck
from vfiotool.vm.finding import PreflightFinding, WantedGuest, parse_memory, words_of
from vfiotool.vm.handed import handed, handed_socket, handed_vdpa
from vfiotool.vm.machine import Q35

GIB = 1 << 30
CARD = "0000:01:00.0"
AUDIO = "0000:01:00.1"
PORT = "0000:00:01.0"
MEM32, MEM64 = 0x40200, 0x14220C


@dataclass
class Machine:
    """A host with one card behind a port, on vfio-pci; tests add what they are about."""

    small: SmallHost = field(default_factory=SmallHost)
    path: str = ""

    def card(
        self,
        identity: str = "1234:11e8",
        class_code: str = "020000",
        *,
        address: str = CARD,
        driver: str | None = "vfio-pci",
        group: int = 1,
        methods: str | None = "flr",
        bars: tuple[tuple[int, int, int], ...] = (),
        **files: str,
    ) -> Machine:
        small = self.small
        under = (PORT,) if address.startswith("0000:01") else ()
        self.path = small.function(
            address,
            under=under,
            identity=identity,
            class_code=class_code,
            driver=driver,
            group=group,
        )
        small.file(f"{self.path}/rescan", "")
        small.file(f"{self.path}/driver_override", driver or "(null)")
        if methods:
            small.file(f"{self.path}/reset_method", methods)
        lines = ["0x0 0x0 0x0"] * 7
        for index, size, flags in bars:
            lines[index] = f"{1 << 40:#018x} {(1 << 40) + size - 1:#018x} {flags:#018x}"
        small.file(f"{self.path}/resource", "\n".join(lines))
        for name, text in files.items():
            small.file(f"{self.path}/{name}", text)
        return self

    def limits(self, soft: str, *, capabilities: int = 0) -> Machine:
        self.small.file("/proc/self/limits", f"Max locked memory   {soft}   {soft}   bytes")
        status = f"Uid:\t1000\t1000\nCapEff:\t{capabilities:016x}"
        self.small.file("/proc/self/status", status)
        return self

    def check(self, *names: str, **wanted: object) -> list[PreflightFinding]:
        host = self.small.host()
        inventory = read_inventory(host)
        devices = [handed(inventory, name) for name in names or (CARD,)]
        guest = replace(WantedGuest(), **wanted)  # type: ignore[arg-type]
        return list(preflight.check(host, inventory, devices, guest))

    def one(self, kind: str, *names: str, **wanted: object) -> PreflightFinding | None:
        found = [item for item in self.check(*names, **wanted) if item.kind == kind]
        assert len(found) <= 1, found
        return found[0] if found else None


def test_what_is_missing_of_the_memory_lock_is_told_to_the_byte() -> None:
    machine = Machine().card().limits(str(8 * GIB))
    found = machine.one("memory-lock", memory_bytes=16 * GIB)
    assert found is not None and found.severity == "blocker"
    # 16 GiB once, 1 GiB besides, 8 GiB may be locked.
    assert (found.number, found.unit) == (9 * GIB, "bytes")
    assert "9 GiB are missing" in found.detail
    assert f"ulimit -l {17 * GIB // 1024}" in found.remedy
    assert machine.one("memory-lock", memory_bytes=7 * GIB) is None
    assert machine.one("memory-lock") is None


def test_behind_a_virtual_iommu_each_device_locks_the_whole_memory() -> None:
    machine = Machine().card().card(address=AUDIO, group=1).limits(str(17 * GIB))
    assert machine.one("memory-lock", CARD, AUDIO, memory_bytes=16 * GIB) is None
    found = machine.one("memory-lock", CARD, AUDIO, memory_bytes=16 * GIB, viommu=True)
    assert found is not None and found.number == 16 * GIB


def test_a_vm_with_mediated_devices_alone_starts_under_any_limit_on_locked_memory() -> None:
    """The kernel locks what it maps for an IOMMU, and they have none: their drivers lock later."""
    host = open_root(str(Path(__file__).parents[2] / "fixtures" / "hosts" / "mdev-parents"))
    inventory = read_inventory(host)
    devices = [handed(inventory, mdev.uuid) for mdev in inventory.mdevs]
    wanted = WantedGuest(8 * GIB, iommufd=True, viommu=True)
    found = [
        one
        for one in preflight.check(host, inventory, devices, wanted)
        if one.kind == "memory-lock"
    ]
    assert [(one.severity, one.number) for one in found] == [("warning", 9 * GIB - (8 << 20))]
    assert "up to 9 GiB" in found[0].detail


def test_who_may_lock_any_amount_is_told_nothing_but_iommufd_charges_the_user_all_the_same() -> (
    None
):
    machine = Machine().card().limits("65536", capabilities=1 << 14)
    machine.small.file("/dev/iommu", "")
    assert machine.one("memory-lock", memory_bytes=GIB) is None
    found = machine.one("memory-lock", memory_bytes=GIB, iommufd=True)
    assert found is not None and found.number == 2 * GIB - 65536
    # libvirt raises the limit of the QEMU that it starts.
    assert machine.one("memory-lock", memory_bytes=GIB, iommufd=True, hypervisor="libvirt") is None


def test_iommufd_counts_the_users_other_virtual_machines() -> None:
    machine = Machine().card().limits(str(18 * GIB))
    machine.small.file("/dev/iommu", "")
    rows = ["77\tqemu\t/dev/iommu\t?", "78\tqemu\t/dev/iommu\t?", "."]
    machine.small.file("/proc/vfiotool/open-nodes", "\n".join(rows))
    machine.small.file("/proc/77/status", f"Uid:\t1000\t1000\nVmPin:\t{12 << 20} kB")
    machine.small.file("/proc/78/status", f"Uid:\t107\t107\nVmPin:\t{99 << 20} kB")
    found = machine.one("memory-lock", memory_bytes=8 * GIB, iommufd=True)
    assert found is not None and found.number == (9 + 12 - 18) * GIB
    assert "whose other VMs hold 12 GiB" in found.detail


def nodes(machine: Machine, *free_gib: int) -> Machine:
    for number, free in enumerate(free_gib):
        base = f"/sys/devices/system/node/node{number}"
        distances = ["21"] * len(free_gib)
        distances[number] = "10"
        machine.small.file(f"{base}/distance", " ".join(distances))
        machine.small.file(f"{base}/cpulist", f"{number * 4}-{number * 4 + 3}")
        text = f"Node {number} MemTotal: 99 kB\nNode {number} MemFree: {free << 20} kB"
        machine.small.file(f"{base}/meminfo", text)
    return machine


def test_a_node_that_is_too_small_for_the_vm_of_its_device() -> None:
    machine = nodes(Machine().card(numa_node="1"), 64, 8)
    found = machine.one("numa", memory_bytes=16 * GIB, vcpus=8)
    assert found is not None and found.severity == "warning" and found.number == 21
    assert "8 vCPUs, it has 4 processors" in found.detail
    assert "8 GiB of memory more than it has free" in found.detail
    assert found.next.startswith("numactl --cpunodebind=1 --preferred=1 ")
    xml = machine.one("numa", memory_bytes=16 * GIB, hypervisor="libvirt")
    assert xml is not None and "mode='preferred'" in xml.next
    fits = machine.one("numa", memory_bytes=4 * GIB, vcpus=4)
    assert fits is not None and fits.severity == "note"
    assert fits.next.startswith("numactl --cpunodebind=1 --membind=1 ")


def test_devices_of_two_nodes_are_a_distance_apart() -> None:
    machine = nodes(Machine().card(numa_node="0"), 64, 64)
    machine.card(address="0000:05:00.0", group=5, numa_node="1")
    found = machine.one("numa", CARD, "0000:05:00.0")
    assert found is not None and (found.severity, found.number) == ("warning", 21)


def test_huge_pages_that_do_not_suffice_on_the_devices_node() -> None:
    machine = nodes(Machine().card(numa_node="1"), 64, 64)
    for node, total in ((0, 8192), (1, 1024)):
        base = f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB"
        machine.small.file(f"{base}/nr_hugepages", str(total))
        machine.small.file(f"{base}/free_hugepages", str(total))
    found = machine.one("hugepages", memory_bytes=4 * GIB)
    assert found is not None and found.number == 2 * GIB
    assert found.next == (
        "echo 2048 > /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
    )
    assert machine.one("hugepages", memory_bytes=2 * GIB) is None


def vtd(machine: Machine, cap: int, cpu_bits: int = 46) -> Machine:
    machine.small.file("/sys/class/iommu/dmar0/intel-iommu/cap", f"{cap:x}")
    machine.small.link(f"{machine.path}/iommu", "/sys/class/iommu/dmar0")
    machine.small.file(
        "/proc/cpuinfo", f"address sizes\t: {cpu_bits} bits physical, 48 bits virtual"
    )
    return machine


# MGAW 38 (39 bits), tables of three levels; MGAW 47 (48 bits), of four.
NARROW, WIDE = 38 << 16 | 1 << 9, 47 << 16 | 1 << 10


def test_an_iommu_that_is_narrower_than_the_processor() -> None:
    machine = vtd(Machine().card(bars=((0, 1 << 28, MEM64),)), NARROW)
    found = machine.one("mmio-window")
    assert found is not None and (found.number, found.unit) == (39, "bits")
    assert found.next == "-cpu host,host-phys-bits-limit=39"
    xml = machine.one("mmio-window", hypervisor="libvirt")
    assert xml is not None and "limit='39'" in xml.next
    assert vtd(Machine().card(bars=((0, 1 << 28, MEM64),)), WIDE).one("mmio-window") is None


def test_memory_that_the_iommu_does_not_reach() -> None:
    machine = vtd(Machine().card(bars=((0, 1 << 28, MEM64),)), NARROW)
    found = machine.one("iommu-width", memory_bytes=512 * GIB)
    assert found is not None and found.severity == "blocker"
    assert found.number == 2 * GIB + (1 << 28)
    assert machine.one("iommu-width", memory_bytes=256 * GIB) is None


@pytest.mark.parametrize(
    ("bars", "kind", "number"),
    [
        (((0, 1 << 30, MEM32),), "bar-32", 1 << 30),
        (((0, 64 << 30, MEM64),), "bar-64", 64 << 30),
    ],
)
def test_bars_that_a_guests_windows_do_not_hold(
    bars: tuple[tuple[int, int, int], ...], kind: str, number: int
) -> None:
    found = Machine().card(bars=bars).one(kind)
    assert found is not None and found.number == number
    assert Machine().card(bars=((0, 1 << 24, MEM32),)).one(kind) is None


def test_a_virtual_iommu_can_run_out_of_mappings() -> None:
    machine = Machine().card()
    found = machine.one("mappings", memory_bytes=GIB, viommu=True)
    assert found is not None and found.number == 262144 - 65535
    assert machine.one("mappings", memory_bytes=GIB) is None
    machine.small.file("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "262144")
    assert machine.one("mappings", memory_bytes=GIB, viommu=True) is None
    machine.small.file("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "4")
    found = machine.one("mappings", memory_bytes=GIB)
    assert found is not None and (found.severity, found.number) == ("blocker", 1)


def test_a_reserved_region_within_the_guests_memory() -> None:
    machine = Machine().card()
    base = "/sys/kernel/iommu_groups/1/reserved_regions"
    machine.small.file(base, f"{5 * GIB:#x} {5 * GIB + 0xFFFFF:#x} reserved")
    found = machine.one("reserved-region", memory_bytes=4 * GIB)
    assert found is not None and (found.severity, found.number) == ("blocker", 1 << 20)
    assert machine.one("reserved-region", memory_bytes=2 * GIB) is None
    machine.small.file(base, "0xfee00000 0xfeefffff msi")
    assert machine.one("reserved-region", memory_bytes=64 * GIB) is None
    machine.small.file(base, f"{5 * GIB:#x} {5 * GIB + 0xFFFFF:#x} direct-relaxable")
    assert machine.one("reserved-region", memory_bytes=4 * GIB) is None


def test_a_window_is_held_against_the_memory_of_this_architectures_machine() -> None:
    machine = Machine().card()
    machine.small.file("/sys/kernel/iommu_groups/1/reserved_regions", "0x8000000 0x80fffff msi")
    found = machine.one("reserved-region", memory_bytes=8 * GIB)
    assert found is not None and "another machine type" not in found.remedy[0]
    machine.small.file("/proc/sys/kernel/arch", "aarch64")
    assert machine.one("reserved-region", memory_bytes=8 * GIB) is None
    base = "/sys/kernel/iommu_groups/1/reserved_regions"
    machine.small.file(base, f"{5 * GIB:#x} {5 * GIB + 0xFFFFF:#x} reserved")
    found = machine.one("reserved-region", memory_bytes=8 * GIB)
    assert found is not None and found.remedy == ("less memory: at most 4096M",)


def test_what_the_firmware_demands_is_said_once() -> None:
    machine = Machine().card()
    base = "/sys/kernel/iommu_groups/1/reserved_regions"
    machine.small.file(base, "0xe8000 0xe8fff direct")
    assert machine.one("reserved-region", memory_bytes=8 * GIB) is None
    assert machine.one("reserved-direct", memory_bytes=8 * GIB) is not None


def test_a_window_right_at_the_beginning_has_no_memory_below_it() -> None:
    machine = Machine().card()
    base = "/sys/kernel/iommu_groups/1/reserved_regions"
    machine.small.file(base, "0xe8000 0xe8fff reserved")
    found = machine.one("reserved-region", memory_bytes=8 * GIB)
    assert found is not None and "another machine type" in found.remedy[0]


def test_where_q35_puts_memory() -> None:
    assert Q35.ranges(2 * GIB) == ((0, 2 * GIB - 1),)
    assert Q35.ranges(8 * GIB) == ((0, 2 * GIB - 1), (4 * GIB, 10 * GIB - 1))


def msix(vectors: int) -> bytes:
    config = bytearray(256)
    config[0:2], config[6], config[0x34] = b"\x34\x12", 0x10, 0x40
    config[0x40], config[0x42:0x44] = 0x11, (vectors - 1).to_bytes(2, "little")
    return bytes(config)


def test_fewer_vectors_than_processors() -> None:
    machine = Machine().card()
    machine.small.files[f"{machine.path}/config"] = msix(5)
    found = machine.one("vectors", vcpus=8)
    assert found is not None and (found.severity, found.number) == ("note", 5)
    assert machine.one("vectors", vcpus=5) is None


def rebar(size_bit: int, sizes: int) -> bytes:
    config = bytearray(4096)
    config[0:2], config[6], config[0x34], config[0x40] = b"\x34\x12", 0x10, 0x40, 0x10
    config[0x42] = 2
    config[0x100:0x104] = (0x0015 | 1 << 16).to_bytes(4, "little")
    config[0x104:0x108] = (sizes << 4).to_bytes(4, "little")
    config[0x108:0x10C] = (1 | 1 << 5 | size_bit << 8).to_bytes(4, "little")
    return bytes(config)


def test_a_bar_that_could_be_larger() -> None:
    machine = Machine().card()
    machine.small.files[f"{machine.path}/config"] = rebar(8, 1 << 8 | 1 << 14)
    found = machine.one("resizable-bar")
    assert found is not None and found.number == 16 * GIB
    assert found.next.endswith(f"echo 14 > /sys/bus/pci/devices/{CARD}/resource1_resize")
    machine.small.files[f"{machine.path}/config"] = rebar(14, 1 << 8 | 1 << 14)
    assert machine.one("resizable-bar") is None


@pytest.mark.parametrize(
    ("methods", "identity", "severity", "words"),
    [
        (None, "1234:11e8", "warning", "works once, not twice"),
        ("pm", "1234:11e8", "note", "through D3hot"),
        ("bus", "1002:67df", "warning", "works once, not twice"),
        ("device_specific bus", "1002:67df", None, ""),
        ("bus", "10de:2684", None, ""),
        ("flr bus", "1234:11e8", None, ""),
    ],
)
def test_the_verdict_on_reset_before_the_first_start(
    methods: str | None, identity: str, severity: str | None, words: str
) -> None:
    found = Machine().card(identity, methods=methods).one("reset")
    assert (found.severity if found else None) == severity
    assert found is None or words in found.detail


@pytest.mark.parametrize(
    ("driver", "group", "severity", "words"),
    [
        (None, 2, "warning", f"nor on a VFIO driver: {AUDIO}"),
        ("snd_hda_intel", 2, "warning", "works once, not twice"),
        (None, 1, "warning", "works once, not twice"),
        ("vfio-pci", 1, "note", "whose other functions are in its group"),
        ("vfio-pci", 2, "note", "not when the guest reboots"),
    ],
)
def test_a_bus_is_reset_with_its_other_functions_where_vfio_has_them(
    driver: str | None, group: int, severity: str, words: str
) -> None:
    # Function 0 is said to have a reset of the bus, which the kernel refuses.
    for methods in (None, "bus"):
        machine = Machine().card(methods=methods)
        machine.card(address=AUDIO, methods=None, driver=driver, group=group)
        found = machine.one("reset")
        assert found is not None and found.severity == severity and words in found.detail
    if severity == "warning":
        assert found.remedy == (f"vfiotool vm check {CARD} {AUDIO}", f"vfiotool bind {AUDIO}")


def test_a_bus_can_be_reset_with_all_of_its_functions_in_one_vm() -> None:
    machine = Machine().card(methods=None).card(address=AUDIO, methods=None)
    both = [item for item in machine.check(CARD, AUDIO) if item.kind == "reset"]
    assert [item.severity for item in both] == ["note", "note"]
    assert "this VM has all" in both[0].detail


def test_a_device_without_power() -> None:
    found = Machine().card(power_state="D3cold").one("d3cold")
    assert found is not None and found.severity == "warning"
    assert Machine().card(power_state="D3hot").one("d3cold") is None


def test_graphics_cards_and_their_rom() -> None:
    first = Machine().card(class_code="030000", boot_vga="1").one("rom")
    assert first is not None and first.severity == "warning"
    none = Machine().card(class_code="030000", boot_vga="0").one("rom")
    assert none is not None and none.severity == "note"
    assert Machine().card(class_code="030000", bars=((6, 1 << 17, MEM32),)).one("rom") is None
    assert Machine().card().one("rom") is None


def test_intels_integrated_graphics() -> None:
    here = "0000:00:02.0"
    machine = Machine().card("8086:3e92", "030000", address=here)
    found = machine.one("intel-graphics", here)
    assert found is not None and "x-igd-opregion=on" in found.next
    assert Machine().card("8086:56a0", "030000").one("intel-graphics") is None


def test_the_audio_of_a_graphics_card_stays_behind() -> None:
    machine = Machine().card(class_code="030000", bars=((6, 1 << 17, MEM32),))
    machine.card("10de:22bb", "040300", address=AUDIO)
    found = machine.one("other-functions")
    assert found is not None and (found.severity, found.number) == ("warning", 1)
    assert found.next == f"vfiotool vm check {CARD} {AUDIO}"
    assert machine.one("other-functions", CARD, AUDIO) is None


def test_what_nothing_keeps_from_its_host_driver() -> None:
    machine = Machine().card()
    machine.card("8086:10c9", address=AUDIO, driver=None)
    found = machine.one("returns-to-host")
    assert found is not None and found.next == f"vfiotool bind {AUDIO} --driver none"
    assert found.number == 1
    machine.small.file(f"{machine.path}/driver_override", "none")
    assert machine.one("returns-to-host") is None
    # A probe leaves one that has a driver: by vfio-pci's ids, no override keeps it there.
    machine.card("8086:10c9", address=AUDIO, driver="vfio-pci")
    machine.small.file(f"{machine.path}/driver_override", "(null)")
    assert machine.one("returns-to-host") is None


@pytest.mark.parametrize(
    ("driver", "features", "words"),
    [
        ("vfio-pci", None, "cannot be migrated"),
        ("mlx5_vfio_pci", None, "can be migrated if"),
        ("mlx5_vfio_pci", "stop-copy\np2p", "can be migrated:"),
        ("vfio-pci", "", "cannot be migrated"),
    ],
)
def test_whether_the_vm_can_be_migrated(driver: str, features: str | None, words: str) -> None:
    machine = Machine().card(driver=driver)
    machine.small.folders.add(f"{machine.path}/vfio-dev")
    if features is not None:
        machine.small.file(f"/sys/kernel/debug/vfio/{CARD}/migration/features", features)
    found = machine.one("migration")
    assert found is not None and words in found.detail and found.severity == "note"


VF = "0000:01:10.0"


@pytest.mark.parametrize(
    ("flags", "down"), [(("0x1002",), True), (("0x1003",), False), (("0x2", "0x3"), False)]
)
def test_a_vf_whose_pf_is_down(flags: tuple[str, ...], down: bool) -> None:
    machine = Machine().card()
    for number, text in enumerate(flags):
        machine.small.file(f"{machine.path}/net/eth{number}/flags", text)
        machine.small.file(f"/sys/class/net/eth{number}/flags", text)
    machine.card(address=VF, group=2)
    machine.small.link(f"{machine.path}/physfn", f"../{CARD}")
    found = machine.one("pf-down", VF)
    assert (found is not None) == down
    if found is not None:
        assert (found.severity, found.next) == ("warning", "ip link set eth0 up")
    assert machine.one("pf-down", CARD) is None


def test_who_holds_the_group_is_named_with_the_command_that_shows_it() -> None:
    machine = Machine().card()
    machine.small.file("/proc/vfiotool/open-nodes", "42\tqemu\t/dev/vfio/1\tchar/241:0\n.")
    machine.small.file("/dev/vfio/1", "")
    found = machine.one("held")
    assert found is not None and found.next == "ps -fp 42" and "qemu" in found.detail


def test_a_host_without_iommufd() -> None:
    machine = Machine().card()
    assert machine.one("no-iommufd", iommufd=True) is not None
    machine.small.file("/dev/iommu", "")
    assert machine.one("no-iommufd", iommufd=True) is None


def test_sockets_and_vdpa_devices_want_shared_memory(tmp_path: Path) -> None:
    small = SmallHost()
    small.link("/sys/bus/vdpa/devices/vdpa0", "/sys/devices/vdpa0")
    small.file("/sys/devices/vdpa0/uevent", "")
    host = small.host()
    devices = [handed_vdpa(host, "vdpa0"), handed_socket("vhost-user-blk", "/run/a.sock")]
    guest = WantedGuest(memory_bytes=4 * GIB)
    found = preflight.check(host, read_inventory(host), devices, guest)
    kinds = [(item.device, item.kind, item.severity) for item in found]
    assert ("vdpa0", "no-node", "blocker") in kinds
    assert ("vdpa0", "shared-memory", "note") in kinds
    assert ("/run/a.sock", "shared-memory", "note") in kinds
    with pytest.raises(UsageError):
        handed_socket("vhost-user-blk", "/run/a\nb.sock")


def test_a_remedy_is_one_command_whatever_the_sockets_path_holds() -> None:
    path = "/run/my vm$(reboot);x.sock"
    device = handed_socket("vhost-user-blk", path)
    absent = ReadyCheck(device, None, None, (), (), (), None, None, exists=False)
    found = judge_card(absent, {device.name}, WantedGuest(), Q35)
    (remedy,) = (item.next for item in found if item.kind == "no-socket")
    assert shlex.split(remedy)[-1] == path and shlex.quote(path) in remedy


def test_findings_are_the_same_from_a_snapshot(tmp_path: Path) -> None:
    machine = vtd(nodes(Machine().card(numa_node="1"), 64, 8), NARROW).limits(str(GIB))
    host = machine.small.host()
    from vfiotool.cli.look.snapshot import probes

    save(capture(host, probes()), str(tmp_path / "a.txt"))
    again = open_root(str(tmp_path / "a.txt"))
    wanted = WantedGuest(16 * GIB, 8, "qemu", False, True)
    first = [
        preflight.check(one, inventory, [handed(inventory, CARD)], wanted)
        for one in (host, again)
        for inventory in [read_inventory(one)]
    ]
    assert first[0] == first[1] and len(first[0]) == 4


def test_every_finding_has_evidence_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(Path(__file__).resolve().parents[2] / "fixtures" / "hosts" / "shared-group")
    line = ["--root", root, "vm", "check", "02:01.0", "--memory", "16G", "--viommu"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found and all(item["evidence"] and item["remedy"] for item in found)
    assert main(line) == 0
    assert "warning: mappings" in capsys.readouterr().out
    assert main([*line, "--hypervisor", "xen"]) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("16G", 16 * GIB), ("2048", 2 * GIB), ("512m", GIB // 2), ("1TiB", 1 << 40)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size
    for bad in ("0", "-1G", "1.5G", "G", "9999999T"):
        with pytest.raises(UsageError):
            parse_memory(bad)


def test_sizes_for_people() -> None:
    assert [words_of(size) for size in (16 * GIB, 3 * GIB // 2, 65536, 12)] == [
        "16 GiB",
        "1.5 GiB",
        "64 KiB",
        "12 B",
    ]
