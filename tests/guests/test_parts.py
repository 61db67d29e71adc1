"""The lab without a guest: machines, command lines, archives, settings, kernel images."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import shlex
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vfiotool.errors import NotFound, Unsupported
from vfiotool.lab import guest, image, machines, qemu
from vfiotool.lab.guest import hidden_folders
from vfiotool.lab.kernels import bzimage, cache, packages, stored
from vfiotool.lab.kernels import catalogue as kernels

ALL_MODELS = frozenset(d.model for m in machines.MACHINES.values() for d in m.devices)


def arguments(name: str, models: frozenset[str] = ALL_MODELS) -> list[str]:
    machine = machines.find(name)
    files = {disk.id: f"/scratch/{disk.id}" for disk in machine.disks}
    return machines.arguments(machine, files, models)


def values_of(option: str, line: list[str]) -> list[str]:
    return [value for key, value in itertools.pairwise(line) if key == option]


def test_basic_machine_is_this_command_line() -> None:
    assert arguments("basic") == [
        *("-nodefaults", "-vga", "none"),
        *("-machine", "q35,kernel-irqchip=split"),
        *("-device", "intel-iommu,intremap=on,caching-mode=on"),
        *("-device", "edu,bus=pcie.0,addr=0x1"),
        *("-device", "pci-testdev,bus=pcie.0,addr=0x2,membar=4096"),
        *("-device", "pcie-root-port,id=rp9,bus=pcie.0,addr=0x19,chassis=9"),
    ]


@pytest.mark.parametrize(("name", "iommu"), [("no-iommu", None), ("virtio-iommu", "virtio-iommu")])
def test_machine_has_the_iommu_it_says(name: str, iommu: str | None) -> None:
    devices = values_of("-device", arguments(name))
    found = [d for d in devices if "iommu" in d]
    assert [d.partition("-pci")[0] for d in found] == ([iommu] if iommu else [])
    assert all("kernel-irqchip" not in m for m in values_of("-machine", arguments(name)))


def test_shared_group_puts_two_devices_behind_one_conventional_bridge() -> None:
    devices = values_of("-device", arguments("shared-group"))
    assert "pcie-pci-bridge,id=br0,bus=rp4" in devices
    assert [d.split(",")[0] for d in devices if "bus=br0" in d] == ["edu", "pci-testdev"]


def test_a_model_that_qemu_lacks_is_left_out_and_named() -> None:
    without = ALL_MODELS - {"igb"}
    assert not [d for d in values_of("-device", arguments("sriov", without)) if "igb" in d]
    assert [d for d in values_of("-device", arguments("sriov")) if d.startswith("igb,")]
    assert machines.missing_models(machines.find("sriov"), without) == ("igb",)


@pytest.mark.parametrize("name", machines.MACHINES)
def test_machine_is_consistent(name: str) -> None:
    """Every bus, drive and network that a device names exists, and no slot is taken twice."""
    machine = machines.find(name)
    line = arguments(name)
    ids = {"pcie.0"}
    slots = ["0x1d", "0x1e", "0x1f"]
    for item in machine.devices:
        pairs = dict(item.properties)
        assert pairs.get("bus", "pcie.0") in ids, item
        ids |= {"sd-bus"} if item.model == "sdhci-pci" else set()
        ids |= {f"{pairs.get('id')}.0"} if item.model == "qemu-xhci" else set()
        assert pairs.get("drive", "") in {"", *(disk.id for disk in machine.disks)}
        assert pairs.get("netdev", "") in {"", *machine.networks}
        ids.add(pairs.get("id", ""))
        if pairs.get("bus") == "pcie.0":
            slots.append(pairs["addr"])
    assert len(slots) == len(set(slots))
    assert len(values_of("-drive", line)) == len(machine.disks)


def test_unknown_machine_is_not_found_and_lists_the_names() -> None:
    with pytest.raises(NotFound, match=r"no lab machine named toaster.*basic.*storage"):
        machines.find("toaster")


def test_modules_are_loaded_dependencies_first_and_once() -> None:
    text = "k/a.ko: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko:\nk/net-9p.ko.xz: k/c.ko\n"
    assert image.loading_order(["a", "net_9p", "built_in"], text) == (
        "k/c.ko",
        "k/b.ko",
        "k/a.ko",
        "k/net-9p.ko.xz",
    )


def test_settings_survive_the_shell_whatever_they_hold(tmp_path: Path) -> None:
    nasty = ["/tmp/a b", "/tmp/it's", '/tmp/"q"', "/tmp/$HOME", "/tmp/a\nb", "/tmp/*", "-n"]
    conf = tmp_path / "lab.conf"
    conf.write_text(image.settings_text({"PLAIN": nasty[1], "MANY": nasty, "NONE": []}))
    script = f'. {shlex.quote(str(conf))}; printf "%s\\0" "$PLAIN"; eval "set -- $MANY"; '
    script += 'printf "%s\\0" "$@"; eval "set -- $NONE"; printf "%s" $#'
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.split("\0") == [nasty[1], *nasty, "0"]


def parse_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """A reader of its own: name -> (mode, content), up to the trailer."""
    entries = {}
    place = 0
    while True:
        assert data[place : place + 6] == b"070701"
        fields = [int(data[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[place + 110 : place + 110 + name_size - 1].decode()
        place += 110 + name_size
        place += -place % 4
        if name == "TRAILER!!!":
            return entries
        entries[name] = (mode, data[place : place + size])
        place += size
        place += -place % 4


def test_archive_holds_files_devices_and_their_folders_in_order() -> None:
    archive = image.Archive()
    archive.device("dev/console", 5, 1)
    archive.file("a/b/c", b"12345", 0o640)
    archive.file("a/b/d", b"")
    entries = parse_newc(archive.finish())
    assert list(entries) == ["dev", "dev/console", "a", "a/b", "a/b/c", "a/b/d"]
    assert entries["a/b/c"] == (stat.S_IFREG | 0o640, b"12345")
    assert stat.S_ISCHR(entries["dev/console"][0])


def test_only_folders_that_the_guest_would_hide_are_carried_in() -> None:
    folders = [Path(p) for p in ("/tmp/x/clone", "/tmp/x", "/home/me/clone", "/run/v", "/tmp/x y")]
    assert hidden_folders(folders) == ["/run/v", "/tmp/x", "/tmp/x y"]


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        ("deb http://mirror.example/debian bookworm main", "http://mirror.example/debian"),
        ("URIs: https://mirror.example/debian/\nSuites: x", "https://mirror.example/debian"),
        ("deb [signed-by=/k] http://m.example/debian bookworm main", "http://m.example/debian"),
        ("# deb http://mirror.example/debian x main", None),
        ("deb http://deb.example/debian-security bookworm-security main", None),
    ],
)
def test_mirror_is_taken_from_the_machines_own_sources(text: str, mirror: str | None) -> None:
    assert packages.parse_mirror(text) == mirror


def fake_bzimage(payload: bytes, release: bytes = b"6.12.1-test (me@x) #1") -> bytes:
    """A boot sector, one setup sector and a payload, with the header fields that are read."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x300 - 0x200)
    head[0x300 : 0x300 + len(release) + 1] = release + b"\0"
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head) + bytes(16) + payload + b"rest"


def zstd_frame(data: bytes) -> bytes:
    """One frame of one uncompressed block (RFC 8878, 3.1.1)."""
    size = len(data).to_bytes(4, "little")
    block = (len(data) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\xa0" + size + block + data


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, zstd_frame])
def test_kernel_inside_a_bzimage_is_found(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 64
    packed = fake_bzimage(compress(elf) + len(elf).to_bytes(4, "little"))
    assert bzimage.uncompressed(packed) == elf
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed)
    assert bzimage.image_release(path) == "6.12.1-test"


def test_unknown_compression_leaves_the_image_as_it_is() -> None:
    assert bzimage.uncompressed(fake_bzimage(b"LZOP1234")) is None
    assert bzimage.uncompressed(fake_bzimage(b"\x28\xb5\x2f\xfdbroken")) is None


def test_a_path_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        kernels.prepare(str(tmp_path / "absent"))
    (tmp_path / "text").write_bytes(b"hello" * 1000)
    with pytest.raises(Unsupported, match="no bzImage"):
        kernels.prepare(str(tmp_path / "text"))


def test_kernel_of_another_fragment_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = stored.folder("iommufd")
    place.mkdir(parents=True)
    stored.store(place, "6.12.1", "source", key=stored.fragment_key())
    assert stored.load("iommufd") is not None
    stored.store(place, "6.12.1", "source", key="another")
    assert stored.load("iommufd") is None


def test_a_folder_of_the_cache_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with pytest.raises(ZeroDivisionError), cache.filled(target) as partial:
        (partial / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with cache.filled(target) as partial:
        (partial / "whole").write_text("x")
    assert sorted(path.name for path in target.iterdir()) == [cache.SEAL, "whole"]


def fake_qemu(tmp_path: Path, script: str) -> qemu.Qemu:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return qemu.Qemu((str(program),), (), "1.0", frozenset())


@pytest.fixture
def kvm_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a KVM node, an empty cache, and a short trial."""
    node = tmp_path / "kvm"
    node.touch()
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(qemu, "KVM_NODE", node)
    monkeypatch.setattr(qemu, "KVM_TRIAL_S", 0.5)
    return node


def test_kvm_that_hangs_is_given_up_and_remembered(tmp_path: Path, kvm_node: Path) -> None:
    hanging = fake_qemu(tmp_path, f"echo x >> {tmp_path}/starts; exec sleep 600")
    first = qemu.accelerator(hanging, tmp_path / "image")
    again = qemu.accelerator(hanging, tmp_path / "image")
    assert first.name == again.name == "tcg"
    assert first.reason == "KVM hangs in a trial boot"
    assert (tmp_path / "starts").read_text() == "x\n"


def test_kvm_that_fails_gives_its_words_as_the_reason(tmp_path: Path, kvm_node: Path) -> None:
    failing = fake_qemu(tmp_path, "echo could not access KVM >&2; exit 1")
    chosen = qemu.accelerator(failing, tmp_path / "image")
    assert (chosen.name, chosen.reason) == ("tcg", "KVM fails a trial boot")
    assert "could not access KVM" in chosen.detail
    assert qemu.accelerator(failing, tmp_path / "image") == chosen


def test_kvm_that_boots_is_taken_until_the_machine_boots_again(
    tmp_path: Path, kvm_node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'for a; do case $a in file:*) echo "Linux version 6" > "${a#file:}";; esac; done'
    working = fake_qemu(tmp_path, f"{script}; exec sleep 600")
    assert qemu.accelerator(working, tmp_path / "image").name == "kvm"
    monkeypatch.setattr(qemu, "boot_id", lambda: "another boot")
    broken = fake_qemu(tmp_path, "exit 1")
    assert qemu.accelerator(broken, tmp_path / "image").name == "tcg"


def test_no_kvm_node_needs_no_trial(tmp_path: Path, kvm_node: Path) -> None:
    kvm_node.unlink()
    chosen = qemu.accelerator(fake_qemu(tmp_path, "exit 1"), tmp_path / "image")
    assert (chosen.name, chosen.reason) == ("tcg", f"{kvm_node} is not there")


def test_status_of_kernels_says_how_to_get_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = {row.name: row for row in kernels.statuses()}
    assert list(rows) == ["host", "6.1", "6.12", "iommufd"]
    assert rows["6.1"].get == "vfiotool lab kernels --get 6.1"
    assert json.dumps([kernels.as_json(row) for row in rows.values()])


class Slow:
    """A guest whose first frame comes at `at_s`, and which waits for a processor for a share of the
    time; the clock is moved by waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_s: float, share: float) -> None:
        self.now = 1000.0
        self.at, self.share = self.now + at_s, share
        monkeypatch.setattr(guest.time, "monotonic", lambda: self.now)

    def waited(self) -> float:
        return (self.now - 1000.0) * self.share

    def receive(self, deadline: float) -> guest.Frame | None:
        self.now = max(self.now, min(deadline, self.at))
        return (guest.Kind.OUTPUT, 0, b"") if self.now >= self.at else None


@pytest.mark.parametrize(
    ("at_s", "share", "comes", "ends_s"),
    [
        (50, 0.0, True, 50),
        (150, 0.0, False, 100),  # nothing held it up: it is broken
        (150, 0.5, True, 150),
        (350, 0.5, False, 200),  # half of its time it ran, and did not come up
        (350, 0.8, True, 350),
        (900, 1.0, False, 500),
    ],
)
def test_a_boot_is_given_the_time_that_it_waited_for_a_processor(
    monkeypatch: pytest.MonkeyPatch, at_s: float, share: float, comes: bool, ends_s: float
) -> None:
    slow = Slow(monkeypatch, at_s, share)
    assert (guest.within(100.0, slow.waited, slow.receive) is not None) == comes
    assert slow.now - 1000.0 == pytest.approx(ends_s, rel=0.1)


def test_a_process_tells_how_long_it_waited_for_a_processor() -> None:
    assert 0.0 < guest.waited_s(os.getpid()) < 1e6
    assert guest.waited_s(2**22 + 1) == 0.0
