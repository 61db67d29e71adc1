"""The small guest of `vm run`: its archive, its report, and a QEMU that ends as it pleases."""

from __future__ import annotations

import hashlib
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab import qemu, trial
from vfiotool.lab.kernels import catalogue
from vfiotool.lab.kernels.stored import Kernel
from vfiotool.lab.qemu import Accelerator, Qemu

PORTS = (
    "pcie-root-port,id=vfio-rp0,bus=pcie.0,chassis=100,addr=0x1b.0,multifunction=on",
    "vfio-pci,host=0000:00:01.0,id=vfio-0000-00-01.0,bus=vfio-rp0",
    "pcie-root-port,id=vfio-rp1,bus=pcie.0,chassis=101,addr=0x1b.1",
)
REPORT = """\
start 6.12.0
function 0000:00:1b.0/0 0000:01:00.0 0x1234 0x11e8 0x00ff00 -
register 0000:00:1b.0/0 0 32 0x010000ED
function 0000:00:1b.1/0 0000:02:00.0 0x1b36 0x0010 0x010802 nvme
disk 0000:00:1b.1/0 nvme0n1 2048 ad7f
net 0000:00:1b.1/0 eth0 52:54:00:00:00:01 up
disk 0000:99:00.0/0 of another one
nonsense
failed 0000:00:1b.1/0 nvme0n2 dd: I/O error
output hello  there
end 3
"""
# The report goes where -chardev socket,id=report,fd=N says.
FAKE = """\
import socket, sys
words = sys.argv
fd = int(next(w for w in words if w.startswith("socket,id=report")).rpartition("=")[2])
channel = socket.socket(fileno=fd)
{body}
"""


def guest(tmp_path: Path, body: str, modules: Path | None = None) -> trial.TrialGuest:
    program = tmp_path / "fake-qemu"
    program.write_text(f"#!{sys.executable}\n{FAKE.format(body=body)}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "image").write_bytes(bytes(0x1000))
    (tmp_path / "busybox").write_bytes(b"busybox")
    kernel = Kernel("k", "6.12.0", tmp_path / "image", modules, "here")
    qemu = Qemu((str(program),), (), "10.0", frozenset())
    tcg = Accelerator("tcg", "a test")
    return trial.TrialGuest(qemu, tcg, kernel, tmp_path / "busybox", command="echo hello")


def test_the_root_ports_are_found_among_the_options() -> None:
    assert trial.guest_ports(["-device", *PORTS]) == ["0000:00:1b.0", "0000:00:1b.1"]


def test_the_report_is_read_line_by_line() -> None:
    found = trial.Trial()
    for line in REPORT.splitlines():
        trial.read_line(found, line)
    edu, nvme = found.functions
    assert (edu.place, edu.vendor, edu.device, edu.driver) == (
        "0000:00:1b.0/0",
        "1234",
        "11e8",
        None,
    )
    assert edu.register == (0, 32, "0x010000ED")
    assert nvme.disks == [("nvme0n1", 2048 * 512, "ad7f")]
    assert nvme.interfaces == [("eth0", "52:54:00:00:00:01", "up")]
    assert nvme.failed == ["nvme0n2 dd: I/O error"]
    assert (found.release, found.code, found.output) == ("6.12.0", 3, ["hello  there"])


@pytest.mark.parametrize("line", ["", "end", "end x", "start", "function a b", "disk", "register"])
def test_a_line_that_is_none_is_left_out(line: str) -> None:
    found = trial.Trial()
    for each in (*REPORT.splitlines()[:2], line):
        trial.read_line(found, each)
    assert not found.ended and len(found.functions) == 1


def test_a_start_is_reported_and_qemu_has_ended(tmp_path: Path) -> None:
    body = f"channel.sendall({REPORT.encode()!r}); print('a warning')"
    with trial.TrialFiles(guest(tmp_path, body), PORTS) as files:
        done, again = files.boot(60), files.boot(60)
        folder = files.folder
    assert done.ended and again.ended and len(done.functions) == 2
    assert (done.qemu_code, done.qemu_words) == (0, "a warning")
    assert not folder.exists()


def test_a_qemu_that_fails_is_quoted(tmp_path: Path) -> None:
    body = "sys.exit('vfio 0000:00:01.0: group 1 is not viable')"
    with trial.TrialFiles(guest(tmp_path, body), PORTS) as files:
        done = files.boot(60)
    assert not done.ended and not done.late and done.release is None
    assert (done.qemu_code, done.qemu_words) == (1, "vfio 0000:00:01.0: group 1 is not viable")


def test_a_guest_that_says_nothing_is_ended_at_its_limit(tmp_path: Path) -> None:
    body = "print('stuck', flush=True); channel.recv(1)"
    with trial.TrialFiles(guest(tmp_path, body), PORTS) as files:
        done = files.boot(2.0)
    assert not done.ended and done.late and done.qemu_code != 0


def test_a_qemu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    made = guest(tmp_path, "")
    (tmp_path / "fake-qemu").write_text("#!/no/such/program\n")
    found = Qemu((str(tmp_path / "nothing"),), (), "10", frozenset())
    made = trial.TrialGuest(found, made.accelerator, made.kernel, made.busybox)
    with trial.TrialFiles(made, PORTS) as files:
        # setpriv, where there is one, says so itself.
        if shutil.which("setpriv"):
            assert "nothing" in files.boot(20).qemu_words
        else:
            with pytest.raises(KernelError, match="does not start"):
                files.boot(20)


def test_modules_are_those_that_the_devices_want_and_what_they_need(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    (modules / "kernel/gpu").mkdir(parents=True)
    for name in ("nvme", "nvme-core", "virtio_blk", "igbvf", "gpu/card"):
        (modules / f"kernel/{name}.ko").write_bytes(name.encode())
    (modules / "modules.dep").write_text(
        "kernel/nvme.ko: kernel/nvme-core.ko\nkernel/nvme-core.ko:\nkernel/virtio_blk.ko:\n"
        "kernel/igbvf.ko:\nkernel/gpu/card.ko:\n"
    )
    table = (
        "alias pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf\n"
        "alias pci:v000010DEd*sv*sd*bc03sc*i* card\n"
        "alias pci:v*d*sv*sd*bc01sc08i02* nvme\n"
    )
    (modules / "modules.alias").write_text(table)
    alias = "pci:v00008086d000010CAsv00000000sd00000000bc02sc00i00"
    assert trial.module_names(table, alias) == ["igbvf"]
    assert trial.module_names(table, "pci:v00008086d00001521sv00sd00bc02sc00i00") == []
    card = "pci:v000010DEd00002684sv00000000sd00000000bc03sc00i00"
    made = guest(tmp_path, "", modules)
    made = trial.TrialGuest(
        made.qemu, made.accelerator, made.kernel, made.busybox, aliases=(alias, card)
    )
    archive = trial.initramfs(made, PORTS)
    order = b"MODULES='kernel/virtio_blk.ko kernel/nvme-core.ko kernel/nvme.ko kernel/igbvf.ko'"
    assert order in archive and b"card.ko" not in archive
    assert b"PORTS='0000:00:1b.0 0000:00:1b.1'" in archive


@pytest.mark.lab
def test_a_real_one_reads_each_device(tmp_path: Path) -> None:
    need_lab("6.12")
    found, kernel = qemu.find(), catalogue.prepare("6.12")
    options = ["-m", "256M"]
    disks = {name: tmp_path / name for name in ("nvme", "virtio")}
    for name, path in disks.items():
        path.write_bytes(name.encode() * 65536)
        options += ["-drive", f"if=none,id={name},file={path},format=raw"]
    models = ("nvme,serial=one,drive=nvme", "virtio-blk-pci,drive=virtio", "edu")
    for port, model in enumerate(models):
        place = f"chassis={port},addr=0x1b.{port},multifunction=on"
        options += ["-device", f"pcie-root-port,id=rp{port},{place}"]
        options += ["-device", f"{model},bus=rp{port}"]
    tcg = Accelerator("tcg", "a test")
    made = trial.TrialGuest(found, tcg, kernel, trial.find_busybox(), command="echo done")
    with trial.TrialFiles(made, options) as files:
        done = files.boot(300)
    assert done.ended and done.output == ["done"], done
    nvme, virtio, edu = done.functions
    assert nvme.disks + virtio.disks == [
        (node, path.stat().st_size, hashlib.sha256(path.read_bytes()[:4096]).hexdigest())
        for node, path in (("nvme0n1", disks["nvme"]), ("vda", disks["virtio"]))
    ], done
    assert edu.register == (0, 32, "0x010000ED")


def test_a_busybox_that_needs_libraries_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.packages, "ready_layer", lambda: None)
    monkeypatch.setattr(trial, "OF_THE_LABS_GUEST", tmp_path / "none")
    monkeypatch.setattr(trial.shutil, "which", lambda name, path: sys.executable)
    with pytest.raises(Unsupported, match="static busybox") as caught:
        trial.find_busybox()
    assert "busybox-static" in caught.value.hint


def test_nothing_is_fetched_for_a_busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object) -> None:
        pytest.fail("packages are looked for")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trial.packages.Apt, "update", fetched)
    monkeypatch.setattr(trial.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(trial, "OF_THE_LABS_GUEST", tmp_path / "none")
    with pytest.raises(Unsupported, match="static busybox"):
        trial.find_busybox()
    monkeypatch.setattr(trial, "OF_THE_LABS_GUEST", Path(sys.executable))
    assert trial.find_busybox() == Path(sys.executable)
