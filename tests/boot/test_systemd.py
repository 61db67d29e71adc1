"""A real systemd boot: devices are handed over before VM managers start, and given back after.

A copy of a Debian root (tests/debian_root.py) boots in QEMU with an edu device and an NVMe disk.
Each boot runs one job, started after a unit that stands where libvirtd stands, and powers off;
what the job wrote to the second serial port is the result.
"""

from __future__ import annotations

import compileall
import json
import py_compile
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.boot import debian_root
from vfiotool.lab import qemu
from vfiotool.lab.kernels import packages
from vfiotool.lab.qmp import Qmp

ROOT = Path(__file__).resolve().parents[2]
BOOT_LIMIT_S = 1200
# An emulated guest on a busy machine is slow: systemd must not give up on its disks.
PATIENCE = (
    "panic=-1 nowatchdog no_timer_check mitigations=off nokaslr audit=0 apparmor=0 "
    "selinux=0 rcupdate.rcu_expedited=1 random.trust_cpu=on quiet "
    "fsck.mode=skip systemd.default_timeout_start_sec=900 "
    "systemd.mask=serial-getty@ttyS0.service modprobe.blacklist=iTCO_wdt,lpc_ich,i2c_i801,kvm_amd"
)
FSTAB = """/dev/vda / ext4 rw,relatime 0 0
/dev/vdb /opt ext4 ro,x-systemd.device-timeout=1000 0 0
"""
EDU = "0000:00:04.0"
NVME = "0000:00:05.0"
POLICY = f"""version = 1

[[device]]
match  = {{ address = "{EDU}" }}
driver = "vfio-pci"

[[device]]
match  = {{ address = "{NVME}" }}
driver = "vfio-pci"
"""
# Behind the only root port, where nothing is plugged in while the guest boots.
LATE = "0000:01:00.0"
ABSENT = f'{POLICY}\n[[device]]\nmatch = {{ address = "{LATE}" }}\ndriver = "vfio-pci"\n'

# What a VM manager would find: written by a unit that is ordered as libvirtd is.
MARKER = f"""#!/bin/sh
for address in {EDU} {NVME}; do
    link=$(readlink /sys/bus/pci/devices/$address/driver)
    echo "$address ${{link##*/}}"
done > /run/marker
"""
LIBVIRTD = """[Unit]
Description=Stands where libvirtd stands
After=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/opt/marker
[Install]
WantedBy=multi-user.target
"""
JOB = """[Unit]
Description=The job of this boot
After=multi-user.target libvirtd.service vfiotool-boot.service
[Service]
Type=oneshot
ExecStart=/opt/run
TimeoutStartSec=900
[Install]
WantedBy=multi-user.target
"""
RUN = """#!/bin/sh
exec > /dev/ttyS1 2>&1
stty -F /dev/ttyS1 -opost
cat /run/marker 2>/dev/null | sed 's/^/marker /'
sh /opt/job
echo "job ended"
sync
systemctl poweroff --no-block
"""
SHOW = f"""
for address in {EDU} {NVME}; do
    d=/sys/bus/pci/devices/$address
    link=$(readlink $d/driver)
    echo "driver $address ${{link##*/}} $(cat $d/driver_override)"
done
"""


LISTING = "find /etc /usr/lib/systemd /usr/lib/udev /var/lib/vfiotool -xdev 2>/dev/null | sort"


@dataclass
class Machine:
    """A guest's disk over several boots, and what its next boot runs."""

    folder: Path
    base: debian_root.DebianRoot
    kernel: str
    initrd: Path

    @property
    def disk(self) -> Path:
        return self.folder / "root.ext4"

    def boot(self, job: str, *, words: str = "", plug: bool = False) -> list[str]:
        """Boot, run `job`, power off; the lines that it wrote. Fails if the guest does not end.

        With `plug` an edu device is plugged in once the job has written `plug in`.
        """
        payload = self.folder / "payload.ext4"
        _make_payload(self.folder / "payload", payload, job)
        output = self.folder / "output"
        output.write_bytes(b"")
        found = qemu.find()
        image, _ = self.base.kernels[self.kernel]
        arguments = [
            *[
                "-machine",
                "q35,kernel-irqchip=split",
                "-accel",
                "tcg,thread=multi,tb-size=512",
                "-m",
                "1024",
                "-smp",
                "2",
            ],
            *["-nodefaults", "-nographic", "-no-reboot", "-device"],
            "intel-iommu,intremap=on,caching-mode=on",
            *["-kernel", str(image), "-initrd", str(self.initrd), "-append"],
            f"root=/dev/vda rw console=ttyS0 intel_iommu=on {PATIENCE} {words}",
            *["-drive", f"if=virtio,format=raw,file={self.disk},cache=unsafe"],
            *["-drive", f"if=virtio,format=raw,readonly=on,file={payload}"],
            *["-drive", f"if=none,id=nvme0,format=raw,file={self.folder / 'nvme.raw'}"],
            *["-device", f"edu,bus=pcie.0,addr={EDU[8:10]}"],
            *["-device", f"nvme,drive=nvme0,serial=boot-0,bus=pcie.0,addr={NVME[8:10]}"],
            *["-device", "pcie-root-port,id=rp1,bus=pcie.0,addr=06,chassis=1"],
            *["-serial", f"file:{self.folder / 'console'}", "-serial", f"file:{output}"],
            *["-qmp", f"unix:{self.folder / 'qmp'},server=on,wait=off"],
        ]
        process = subprocess.Popen(
            [*qemu.died_with_parent(), *found.command, *arguments],
            env=found.env(),
            stdin=subprocess.DEVNULL,
        )
        try:
            if plug:
                self._plug(process, output)
            self._wait(process)
        finally:
            process.kill()
            process.wait()
        lines = output.read_text(errors="replace").replace("\r", "").splitlines()
        console = (self.folder / "console").read_text(errors="replace")[-3000:]
        assert "job ended" in lines, "\n".join([*lines, "--- console", console])
        return lines

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + BOOT_LIMIT_S
        console = self.folder / "console"
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
            if console.exists() and b"emergency.target" in console.read_bytes():
                return

    def _plug(self, process: subprocess.Popen[bytes], output: Path) -> None:
        deadline = time.monotonic() + BOOT_LIMIT_S
        while b"plug in" not in output.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, "no job came"
            time.sleep(0.2)
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(self.folder / "qmp"))
            Qmp(stream).device_add("edu", id="late", bus="rp1")

    def take(self, path: str, into: Path) -> None:
        """Copy a file out of the guest's root while it is off."""
        debugfs(self.disk, f"dump {path} {into}")
        assert into.stat().st_size > 1 << 20

    def add_unit(self, name: str, text: str) -> None:
        """Put an enabled unit into the guest's root while it is off."""
        source = self.folder / name
        source.write_text(text)
        wants = "/etc/systemd/system/multi-user.target.wants"
        debugfs(self.disk, f"write {source} /etc/systemd/system/{name}")
        debugfs(self.disk, f"symlink {wants}/{name} ../{name}")


def debugfs(image: Path, request: str) -> None:
    command, environment = packages.need_tool("debugfs", "e2fsprogs")
    subprocess.run(
        [*command, "-w", "-R", request, str(image)],
        env=environment,
        check=True,
        capture_output=True,
    )


def _make_payload(folder: Path, image: Path, job: str) -> None:
    """What the guest mounts at /opt: this vfiotool in an environment of its own, and the job."""
    site = folder / "vfiotool/lib/python3.11/site-packages"
    if not site.exists():
        site.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "vfiotool", site / "vfiotool", ignore=ignore)
        for name in _closure("typer", "rich", "cffi"):
            _copy_distribution(name, site)
        # The guest mounts this read-only: without byte code every start would compile it all.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(site, quiet=2, invalidation_mode=mode)
        (folder / "vfiotool/bin").mkdir()
        (folder / "vfiotool/bin/python").symlink_to("/usr/bin/python3")
        (folder / "vfiotool/pyvenv.cfg").write_text("home = /usr/bin\n")
        script = "#!/opt/vfiotool/bin/python -I\nfrom vfiotool.__main__ import main\nmain()\n"
        _program(folder / "vfiotool/bin/vfiotool", script)
        _program(folder / "marker", MARKER)
        _program(folder / "run", RUN)
        (folder / "policy.toml").write_text(POLICY)
        (folder / "absent.toml").write_text(ABSENT)
    (folder / "job").write_text(f"PATH=/opt/vfiotool/bin:$PATH\n{job}")
    image.unlink(missing_ok=True)
    subprocess.run(["truncate", "-s", "64M", str(image)], check=True)
    command, environment = packages.need_tool("mkfs.ext4", "e2fsprogs")
    subprocess.run(
        [*command, "-q", "-F", "-E", "root_owner=0:0", "-d", str(folder), str(image)],
        env=environment,
        check=True,
    )


def _closure(*names: str) -> set[str]:
    """These distributions and all that they need here (extras left out)."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        pending += [
            re.split(r"[^A-Za-z0-9_.-]", need, maxsplit=1)[0]
            for need in needs
            if "extra ==" not in need
        ]
    return found


def _copy_distribution(name: str, site: Path) -> None:
    for file in metadata.files(name) or []:
        source = Path(str(file.locate()))
        if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
            continue
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, site / file)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    if (reason := debian_root.missing()) is not None:
        pytest.skip(reason)
    base = debian_root.prepare()
    folder = tmp_path_factory.mktemp(f"boot-{request.param}")
    subprocess.run(
        ["cp", "--sparse=always", "--reflink=auto", str(base.image), str(folder / "root.ext4")],
        check=True,
    )
    subprocess.run(["truncate", "-s", "64M", str(folder / "nvme.raw")], check=True)
    guest = Machine(folder, base, request.param, base.kernels[request.param][1])
    fstab = folder / "fstab"
    fstab.write_text(FSTAB)
    debugfs(guest.disk, "rm /etc/fstab")
    debugfs(guest.disk, f"write {fstab} /etc/fstab")
    patience = folder / "patience.conf"
    patience.write_text("[Service]\nTimeoutStartSec=1500\n")
    for unit in ("vfiotool-boot.service.d", "vfiotool-late@.service.d"):
        debugfs(guest.disk, f"mkdir /etc/systemd/system/{unit}")
        debugfs(guest.disk, f"write {patience} /etc/systemd/system/{unit}/patience.conf")
    guest.add_unit("libvirtd.service", LIBVIRTD)
    guest.add_unit("job.service", JOB)
    yield guest
    shutil.rmtree(folder, ignore_errors=True)


def results(lines: list[str], word: str) -> dict[str, str]:
    """`word ADDRESS REST` lines, address to the rest."""
    found = (line.split(" ", 2) for line in lines if line.startswith(f"{word} "))
    return {parts[1]: parts[2] if len(parts) > 2 else "" for parts in found}


def json_after(lines: list[str], mark: str) -> dict[str, Any]:
    text = "\n".join(lines[lines.index(mark) + 1 :])
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text.lstrip())[0]
    return found


@pytest.mark.lab
@pytest.mark.proof
def test_devices_are_handed_over_before_vm_managers_start(machine: Machine) -> None:
    begun = time.monotonic()
    first = machine.boot(
        f"{LISTING} > /root/before{SHOW}vfiotool boot enable /opt/absent.toml; echo code $?\n"
    )
    assert results(first, "driver")[NVME].split() == ["nvme", "(null)"]
    assert "code 0" in first, "\n".join(first)
    print(f"first boot {time.monotonic() - begun:.0f} s", flush=True)

    second = machine.boot(
        f"{SHOW}echo --- status\nvfiotool --json boot status; echo code $?\n"
        "systemctl show -p ActiveState -p Result vfiotool-boot.service\n"
        "journalctl -b -u vfiotool-boot -o short-monotonic --no-pager\n"
        "journalctl -b --no-pager | grep -i 'ordering cycle' && echo CYCLE\n"
        "echo plug in\n"
        f"d=/sys/bus/pci/devices/{LATE}; for try in $(seq 600); do [ -L $d/driver ] && break\n"
        "sleep 1; done\n"
        "echo late $(readlink $d/driver | sed 's,.*/,,')\n"
        "journalctl -b -u 'vfiotool-late@*' --no-pager\n"
        "vfiotool boot disable && echo disabled\n"
        f"{LISTING} > /root/after\n"
        "diff /root/before /root/after && echo same\n",
        plug=True,
    )
    print("\n".join(second), flush=True)
    # The marker ran where libvirtd runs: both devices were in place by then.
    assert results(second, "marker") == {EDU: "vfio-pci", NVME: "vfio-pci"}
    assert results(second, "driver")[NVME].split() == ["vfio-pci", "vfio-pci"]
    assert "ActiveState=active" in second and "Result=success" in second
    assert "CYCLE" not in second
    status = json_after(second, "--- status")
    assert status["enabled"] and status["unit"] == "active"
    # The absent device was reported, waited for at most its limit, and kept nobody.
    assert len(status["last"]["absent"]) == 1 and LATE in status["last"]["absent"][0]
    assert status["last"]["waited_s"] <= 15
    assert "code 1" in second
    # Plugged in later, it was taken without anybody asking.
    assert "late vfio-pci" in second
    assert "disabled" in second and "same" in second

    third = machine.boot(SHOW)
    assert results(third, "marker") == {EDU: "", NVME: "nvme"}
    assert results(third, "driver")[NVME].split() == ["nvme", "(null)"]


@pytest.mark.lab
@pytest.mark.proof
def test_early_takes_the_disk_inside_the_initramfs(machine: Machine) -> None:
    release = (machine.base.image.parent / f"release-{machine.kernel}").read_text()
    first = machine.boot(
        "vfiotool boot enable --early /opt/policy.toml; echo code $?\n"
        f"update-initramfs -u -k {release} && echo rebuilt\n"
        "vfiotool --json boot status > /root/status; echo status $?\n"
        "dracut --force --kver $(uname -r) /root/dracut.img 2>&1 | tail -3\n"
        "lsinitrd /root/dracut.img | grep -E 'vfio-pci.ko|vfiotool' | sed 's/^/dracut /'\n"
    )
    print("\n".join(first), flush=True)
    assert "code 0" in first and "rebuilt" in first, "\n".join(first)
    carried = [line for line in first if line.startswith("dracut ")]
    assert any("vfio-pci.ko" in line for line in carried), "\n".join(first)
    assert any("vfiotool" in line for line in carried), "\n".join(first)
    machine.initrd = machine.folder / "early-initrd"
    machine.take(f"/boot/initrd.img-{release}", machine.initrd)
    # Without the unit: what holds the disk is what the initramfs did.
    second = machine.boot(
        f"{SHOW}"
        "dmesg | grep -E 'nvme nvme0|vfio_pci: add' | sed 's/^/dmesg /'\n"
        "lsblk -dno NAME | grep nvme && echo DISK\n"
        "vfiotool boot disable && echo disabled\n",
        words="systemd.mask=vfiotool-boot.service",
    )
    print("\n".join(second), flush=True)
    assert results(second, "driver")[NVME].split()[0] == "vfio-pci"
    assert not any("nvme nvme0" in line for line in second) and "DISK" not in second
    assert "disabled" in second
    machine.initrd = machine.base.kernels[machine.kernel][1]
