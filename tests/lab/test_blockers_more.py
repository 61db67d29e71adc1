"""Uses that hide below a controller, beside every address and behind other tables, for real.

Each is produced, named by `why`, refused by `bind`, and gone after its cause.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.blockers_guest import (
    PCI,
    assert_passable,
    blockers,
    disk_of,
    driver_of,
    need,
    run,
    wait_for,
    why,
)
from tests.lab.commands import vfiotool

MACHINE = "uses"
KERNELS = ("6.12",)
PROOF = "each use is asked about four times: three minutes"

CAN, CARD, IPMI = "0000:00:01.0", "0000:00:02.0", "0000:00:03.0"
USB, IGB, NIC = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
DISK, OTHER_DISK, ENGINE = "0000:04:00.0", "0000:05:00.0", "0000:06:00.0"
# The vendor of root hubs (Linux Foundation).
HUB = "1d6b"
NVMET = Path("/sys/kernel/config/nvmet")


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """Undoes what a test did, last first."""
    need("vfio-pci")
    with ExitStack() as stack:
        yield stack


def assert_in_use(device: str, kind: str, subject: str) -> dict[str, str]:
    """`why` names the use, and `bind` refuses it by that name and takes it by `--allow`."""
    entries = [entry for entry in blockers(device, kind) if entry["subject"] == subject]
    assert len(entries) == 1, why(device)
    refused = vfiotool("bind", device, "--dry-run")
    assert refused.code == 4, refused
    assert f"{kind}:{subject}" in refused.err + refused.out
    return entries[0]


def interface_of(address: str) -> str:
    wait_for(lambda: list((PCI / address).glob("**/net/*")), f"an interface of {address}")
    return next(iter((PCI / address).glob("**/net/*"))).name


def disk_below(address: str) -> str:
    wait_for(lambda: list((PCI / address).glob("**/block/*")), f"a disk below {address}")
    return next(iter((PCI / address).glob("**/block/*"))).name


def mount(stack: ExitStack, disk: str, point: Path) -> None:
    run("mkfs.ext4", "-qF", f"/dev/{disk}")
    point.mkdir(exist_ok=True)
    run("mount", f"/dev/{disk}", str(point))
    stack.callback(run, "umount", str(point))


def held(stack: ExitStack, node: str) -> None:
    """Open in another process until the test is over."""
    wait_for(lambda: os.path.exists(node), node)
    program = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print('ready', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, node],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def test_a_stick_that_is_mounted_below_a_usb_controller(undo: ExitStack, tmp_path: Path) -> None:
    need("usb-storage", "ext4")
    mount(undo, disk_below(USB), tmp_path / "stick")
    entry = assert_in_use(USB, "mounted", str(tmp_path / "stick"))
    assert f"umount {tmp_path / 'stick'}" in why(USB)[1]["next"], entry
    undo.close()
    assert_passable(USB)


def test_a_stick_that_the_scsi_target_hands_on(undo: ExitStack) -> None:
    """Of a tape drive it would claim nothing; this one is a disk as well."""
    need("usb-storage", "configfs", "target_core_mod", "target_core_pscsi")
    if not os.path.ismount("/sys/kernel/config"):
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    disk = disk_below(USB)
    where = (Path("/sys/class/block") / disk / "device").resolve().name.split(":")
    store = Path("/sys/kernel/config/target/core/pscsi_0/stick")
    for folder in (store.parent, store):
        folder.mkdir()
        undo.callback(folder.rmdir)
    names = ("scsi_host_id", "scsi_channel_id", "scsi_target_id", "scsi_lun_id")
    numbers = (f"{name}={number}" for name, number in zip(names, where, strict=True))
    (store / "control").write_text(",".join(numbers))
    (store / "udev_path").write_text(f"/dev/{disk}")
    (store / "enable").write_text("1")
    assert_in_use(USB, "storage-member", "pscsi_0/stick")


def test_an_address_on_a_usb_network_card(undo: ExitStack) -> None:
    need("cdc_ether")
    name = interface_of(USB)
    run("ip", "address", "add", "192.168.9.1/24", "dev", name)
    undo.callback(run, "ip", "address", "flush", "dev", name)
    assert_in_use(USB, "route", name)
    undo.close()
    assert_passable(USB)


def test_a_usb_device_that_another_machine_has(undo: ExitStack) -> None:
    """As QEMU's usb-host does: by the device's node and not by any class of it."""
    devices = [path.parent for path in (PCI / USB).glob("usb*/*/idVendor")]
    folder = min(path for path in devices if (path / "idVendor").read_text().strip() != HUB)
    bus, number = (int((folder / name).read_text()) for name in ("busnum", "devnum"))
    node = f"/dev/bus/usb/{bus:03}/{number:03}"
    held(undo, node)
    assert_in_use(USB, "open-file", node)
    undo.close()
    assert_passable(USB)


def test_a_program_on_a_can_bus(undo: ExitStack) -> None:
    need("kvaser_pci", "can_raw")
    name = interface_of(CAN)
    listener = undo.enter_context(socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW))
    listener.bind((name,))
    entry = assert_in_use(CAN, "packet-socket", name)
    assert "CAN frames" in entry["detail"]
    undo.close()
    assert_passable(CAN)


def test_a_crypto_engine_that_encrypts(undo: ExitStack) -> None:
    need("virtio_crypto", "algif_skcipher")
    user = undo.enter_context(socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
    user.bind(("skcipher", "virtio_crypto_aes_cbc"))
    assert_in_use(ENGINE, "crypto-engine", "virtio_crypto_aes_cbc")
    undo.close()
    wait_for(lambda: not blockers(ENGINE, "crypto-engine"), "the engine to be left")
    assert_passable(ENGINE)


def test_a_memory_card_that_is_mounted(undo: ExitStack, tmp_path: Path) -> None:
    need("sdhci_pci", "mmc_block", "ext4")
    mount(undo, disk_below(CARD), tmp_path / "card")
    assert_in_use(CARD, "mounted", str(tmp_path / "card"))
    undo.close()
    assert_passable(CARD)


def test_a_program_that_talks_to_the_management_controller(undo: ExitStack) -> None:
    need("ipmi_si", "ipmi_devintf")
    held(undo, "/dev/ipmi0")
    assert_in_use(IPMI, "open-file", "/dev/ipmi0")
    undo.close()
    assert_passable(IPMI)


def test_a_clock_of_a_network_card_that_a_daemon_steers(undo: ExitStack) -> None:
    need("igb")
    if driver_of(IGB) != "igb":
        pytest.skip("this machine has no igb")
    interface_of(IGB)
    clock = next(iter((PCI / IGB).glob("ptp/ptp*"))).name
    held(undo, f"/dev/{clock}")
    assert_in_use(IGB, "open-file", f"/dev/{clock}")
    undo.close()
    assert_passable(IGB)


def test_packets_that_tc_takes_and_sends_elsewhere(undo: ExitStack) -> None:
    """Neither card has an address, and all that one receives leaves by the other."""
    need("sch_ingress", "cls_matchall", "act_mirred", tools=("tc",))
    from_card, to_card = interface_of(NIC), interface_of(IGB)
    run("tc", "qdisc", "add", "dev", from_card, "clsact")
    undo.callback(run, "tc", "qdisc", "del", "dev", from_card, "clsact")
    assert_passable(NIC)
    words = f"dev {from_card} ingress matchall action mirred egress redirect dev {to_card}"
    run("tc", "filter", "add", *words.split())
    assert_in_use(NIC, "traffic-rule", from_card)
    assert_in_use(IGB, "traffic-rule", to_card)
    undo.close()
    assert_passable(NIC)
    assert_passable(IGB)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_RAW])
def test_a_service_that_is_bound_to_an_interface(undo: ExitStack, kind: int) -> None:
    name = interface_of(NIC)
    protocol = socket.IPPROTO_ICMP if kind == socket.SOCK_RAW else 0
    service = undo.enter_context(socket.socket(socket.AF_INET, kind, protocol))
    service.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
    service.bind(("0.0.0.0", 0 if kind == socket.SOCK_RAW else 6767))
    if kind == socket.SOCK_STREAM:
        service.listen()
    entry = assert_in_use(NIC, "packet-socket", name)
    if kind != socket.SOCK_RAW:
        assert "port 6767" in entry["detail"]
    undo.close()
    assert_passable(NIC)


def test_a_controller_that_the_nvme_target_exports_whole(undo: ExitStack) -> None:
    need("nvmet")
    disk_of(OTHER_DISK)
    controller = next(iter((PCI / OTHER_DISK / "nvme").iterdir())).name
    configured()
    system = NVMET / "subsystems" / "through"
    system.mkdir()
    undo.callback(system.rmdir)
    if not (system / "passthru").is_dir():
        pytest.skip("this kernel's target exports no whole controllers")
    (system / "passthru/device_path").write_text(f"/dev/{controller}")
    (system / "passthru/enable").write_text("1")
    undo.callback((system / "passthru/enable").write_text, "0")
    assert_in_use(OTHER_DISK, "storage-member", "through")
    undo.close()
    assert_passable(OTHER_DISK)


def test_a_disk_that_swapped_memory_is_written_back_to(undo: ExitStack) -> None:
    need("zram", tools=("mkswap", "swapon", "swapoff"))
    disk = disk_of(DISK)
    zram = Path("/sys/block/zram0")
    undo.callback((zram / "reset").write_text, "1")
    (zram / "backing_dev").write_text(f"/dev/{disk}")
    (zram / "disksize").write_text("16M")
    assert_in_use(DISK, "storage-member", "zram0")
    run("mkswap", "/dev/zram0")
    run("swapon", "/dev/zram0")
    undo.callback(run, "swapoff", "/dev/zram0")
    assert_in_use(DISK, "swap", "/dev/zram0")
    steps = why(DISK)[1]["next"]
    assert steps[:2] == ["swapoff /dev/zram0", "zramctl --reset /dev/zram0"], steps
    undo.close()
    assert_passable(DISK)


def test_a_disk_that_holds_the_journal_of_another(undo: ExitStack, tmp_path: Path) -> None:
    need("ext4", tools=("mke2fs",))
    disk, journal = disk_of(DISK), disk_of(OTHER_DISK)
    run("mke2fs", "-qF", "-O", "journal_dev", f"/dev/{journal}")
    run("mkfs.ext4", "-qF", "-J", f"device=/dev/{journal}", f"/dev/{disk}")
    point = tmp_path / "files"
    point.mkdir()
    run("mount", f"/dev/{disk}", str(point))
    undo.callback(run, "umount", str(point))
    assert_in_use(OTHER_DISK, "storage-member", journal)
    undo.close()
    assert_passable(OTHER_DISK)
    assert_passable(DISK)


def test_a_card_that_a_driver_in_user_space_has(undo: ExitStack) -> None:
    need("uio_pci_generic")
    interface_of(NIC)
    base = PCI / NIC
    (base / "driver/unbind").write_text(NIC)
    (base / "driver_override").write_text("uio_pci_generic")
    undo.callback(Path("/sys/bus/pci/drivers_probe").write_text, NIC)
    undo.callback((base / "driver_override").write_text, "\n")
    Path("/sys/bus/pci/drivers_probe").write_text(NIC)
    undo.callback((PCI.parent / "drivers/uio_pci_generic/unbind").write_text, NIC)
    node = f"/dev/{next((base / 'uio').iterdir()).name}"
    held(undo, node)
    assert_in_use(NIC, "open-file", node)
    undo.close()
    assert_passable(NIC)


def configured() -> None:
    if not NVMET.is_dir():
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")


def test_a_host_that_runs_from_a_disk_over_the_network(undo: ExitStack) -> None:
    """No step ends an address by which the host's own disk may be reached."""
    need("nvmet", "nvmet_tcp", "nvme_tcp", "ext4")
    configured()
    disk, name = disk_of(DISK), interface_of(NIC)
    run("mkfs.ext4", "-qF", f"/dev/{disk}")
    before = {path.name for path in Path("/sys/class/nvme").iterdir()}
    far = export(undo, disk)
    assert {path.name for path in Path("/sys/class/nvme").iterdir()} > before
    point = Path("/efi")
    point.mkdir(exist_ok=True)
    run("mount", f"/dev/{far}", str(point))
    undo.callback(run, "umount", str(point))
    run("ip", "address", "add", "192.168.9.1/24", "dev", name)
    undo.callback(run, "ip", "address", "flush", "dev", name)
    assert_in_use(NIC, "route", name)
    answer = why(NIC)[1]
    assert answer["next"] == []
    assert "/efi is mounted over the network (NVMe over TCP from" in answer["warnings"][0]
    undo.close()
    assert_passable(NIC)


def export(undo: ExitStack, disk: str) -> str:
    """The disk over NVMe/TCP and the loopback; the name of what arrives."""
    system, port = NVMET / "subsystems" / "far", NVMET / "ports" / "7"
    for folder in (system, system / "namespaces/1", port):
        folder.mkdir()
        undo.callback(folder.rmdir)
    (system / "attr_allow_any_host").write_text("1")
    (system / "namespaces/1/device_path").write_text(f"/dev/{disk}")
    (system / "namespaces/1/enable").write_text("1")
    run("ip", "link", "set", "lo", "up")
    for key, value in {
        "addr_trtype": "tcp",
        "addr_adrfam": "ipv4",
        "addr_traddr": "127.0.0.1",
        "addr_trsvcid": "4420",
    }.items():
        (port / key).write_text(value)
    link = port / "subsystems" / "far"
    link.symlink_to(system)
    undo.callback(link.unlink)
    # Each write is one command, and the answer is read from the same file.
    fabrics = os.open("/dev/nvme-fabrics", os.O_RDWR)
    try:
        os.write(fabrics, b"transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=far")
        answer = os.read(fabrics, 4096).decode()
    finally:
        os.close(fabrics)
    instance = answer.partition("instance=")[2].partition(",")[0]
    controller = Path(f"/sys/class/nvme/nvme{instance}")
    undo.callback((controller / "delete_controller").write_text, "1")
    wait_for(lambda: list(controller.glob("nvme*n*")), "the disk to arrive")
    path = next(iter(controller.glob("nvme*n*"))).name
    # The controller's own path where multipathing is on: nvme2c2n1 of nvme2n1.
    name = f"{path.partition('c')[0]}n{path.rpartition('n')[2]}" if "c" in path else path
    wait_for(lambda: os.path.exists(f"/dev/{name}"), f"/dev/{name}")
    return name


def test_what_the_root_overlay_stands_on(undo: ExitStack) -> None:
    """The guest's own root: a shared folder that only its initramfs saw mounted."""
    shares = [path.name for path in PCI.iterdir() if list(path.glob("virtio*/mount_tag"))]
    assert shares
    for share in shares:
        code, answer = why(share)
        assert code == 1
        assert answer["next"] == []
        assert "mounted" in {entry["kind"] for entry in answer["blockers"]}
