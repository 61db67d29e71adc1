"""A small guest that is started with a host's devices, looks at each of them, and ends.

A kernel, an initramfs of busybox and the few modules that the devices want, and the options that a
hypervisor's command line has for the devices. What the guest saw comes back on its second serial
port (`inside/trial-init.sh` says what it does to a device: it reads).
"""

from __future__ import annotations

import re
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab import needs
from vfiotool.lab.image import INSIDE, Archive, loading_order, module_bytes, settings_text
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.bzimage import uncompressed
from vfiotool.lab.kernels.stored import Kernel
from vfiotool.lab.qemu import Accelerator, Qemu, died_with_parent, find_here, find_newer

# Drivers of what a hypervisor itself provides; others are named by the devices' aliases.
USUAL_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "nvme", "8250_pci")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable audit=0 "
    "apparmor=0 selinux=0 nowatchdog rcupdate.rcu_expedited=1"
)
# Where a lab's guest has the busybox that it came up with.
OF_THE_LABS_GUEST = Path("/run/lab/busybox")
# How long QEMU may take to end after the guest has said everything.
ENDING_S = 30.0
_PT_INTERP = 3
_PORT = re.compile(r"pcie-root-port,.*\baddr=(0x[0-9a-f]+)\.([0-7])")


@dataclass(frozen=True)
class TrialGuest:
    """What the guest is made of. `aliases` are the devices' modaliases, `command` is a shell
    command that it runs at last."""

    qemu: Qemu
    accelerator: Accelerator
    kernel: Kernel
    busybox: Path
    vcpus: int = 1
    aliases: tuple[str, ...] = ()
    command: str = ""


@dataclass
class SeenFunction:
    """A PCI function as the guest saw it. `place` is its root port's address in the guest and its
    function, such as `0000:00:1b.0/0`.

    `disks` are name, size in bytes, and the digest (SHA-256) of the first 4 KiB; `interfaces` name,
    MAC address and state; `register` the BAR, the width in bits and what was read there; `failed`
    the words of a read that failed.
    """

    place: str
    address: str
    vendor: str
    device: str
    class_code: str
    driver: str | None
    disks: list[tuple[str, int, str]] = field(default_factory=list)
    interfaces: list[tuple[str, str, str]] = field(default_factory=list)
    register: tuple[int, int, str] | None = None
    failed: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """One start of the guest, from its own report.

    `release` is None if it never spoke, `code` (the command's exit code) None if it did not come to
    its end; `late` says that it was ended for its limit. `qemu_words` is all that QEMU said,
    `qemu_code` its exit code, `console` the last lines of the guest's console.
    """

    functions: list[SeenFunction] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    release: str | None = None
    code: int | None = None
    late: bool = False
    seconds: float = 0.0
    qemu_words: str = ""
    qemu_code: int | None = None
    console: str = ""

    @property
    def ended(self) -> bool:
        """Whether the guest came to the end of its report."""
        return self.code is not None


def initramfs(guest: TrialGuest, words: Sequence[str]) -> bytes:
    """The archive with busybox, the modules and what the guest is to do."""
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", guest.busybox.read_bytes())
    archive.file("init", (INSIDE / "trial-init.sh").read_bytes())
    modules, names = guest.kernel.modules, []
    if modules is not None:
        for path in _modules(modules, guest.aliases):
            content = module_bytes(modules / path)
            names.append(path.partition(".ko")[0] + ".ko")
            archive.file(f"modules/{names[-1]}", content, 0o644)
    settings: dict[str, str | Sequence[str]] = {
        "MODULES": " ".join(names),
        "PORTS": " ".join(guest_ports(words)),
        "REPORT": "/dev/ttyS1",
        "COMMAND": guest.command,
    }
    archive.file("trial.conf", settings_text(settings).encode(), 0o644)
    return archive.finish()


def guest_ports(words: Iterable[str]) -> list[str]:
    """Addresses in the guest of the root ports among the options, in their order."""
    found = (_PORT.match(word) for word in words)
    return [f"0000:00:{int(port[1], 16):02x}.{port[2]}" for port in found if port]


def _modules(modules: Path, aliases: Iterable[str]) -> tuple[str, ...]:
    """Paths to load, in order. Graphics are left out: they want firmware and show nothing here."""
    names = list(USUAL_MODULES)
    table = (modules / "modules.alias").read_text(encoding="utf-8", errors="replace")
    for alias in aliases:
        names += module_names(table, alias)
    order = loading_order(names, (modules / "modules.dep").read_text(encoding="utf-8"))
    return tuple(path for path in order if "/gpu/" not in path and "/sound/" not in path)


def module_names(modules_alias: str, alias: str) -> list[str]:
    """The modules whose aliases (modules.alias) match a device's modalias."""
    found = []
    bus, _, rest = alias.partition(":")
    vendor = rest[:9]
    for line in modules_alias.splitlines():
        if not line.startswith((f"alias {bus}:{vendor}", f"alias {bus}:v*")):
            continue
        words = line.split()
        pattern = ".*".join(re.escape(part) for part in words[1].split("*"))
        if re.fullmatch(pattern, alias):
            found.append(words[2].replace("-", "_"))
    return found


def command_line(guest: TrialGuest, words: Sequence[str], files: Path) -> list[str]:
    """QEMU's whole command line; the guest's kernel and initramfs are in `files`."""
    return [
        *guest.qemu.command,
        *("-machine", "q35", *guest.accelerator.arguments(), "-smp", str(guest.vcpus)),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(files / "kernel"), "-initrd", str(files / "initramfs")),
        *("-append", KERNEL_ARGUMENTS, "-serial", f"file:{files / 'console'}"),
        *words,
    ]


class TrialFiles:
    """The guest's kernel, initramfs and console, in a folder that goes with the block."""

    def __init__(self, guest: TrialGuest, words: Sequence[str]) -> None:
        self._scratch = TemporaryDirectory(prefix="vfiotool-trial-")
        self.folder = Path(self._scratch.name)
        self.guest, self.words = guest, tuple(words)

    def __enter__(self) -> TrialFiles:
        image = self.guest.kernel.image.read_bytes()
        # A compressed kernel unpacks itself: seconds where QEMU emulates.
        whole = uncompressed(image) if image[0x202:0x206] == b"HdrS" else None
        (self.folder / "kernel").write_bytes(whole or image)
        (self.folder / "initramfs").write_bytes(initramfs(self.guest, self.words))
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    @property
    def command_line(self) -> list[str]:
        return command_line(self.guest, self.words, self.folder)

    def boot(self, limit_s: float) -> Trial:
        """Start the guest once, and wait for its report for `limit_s` at most; QEMU has ended when
        this returns. Raises KernelError if QEMU cannot be started at all."""
        begun = time.monotonic()
        trial = Trial()
        ours, theirs = socket.socketpair()
        with ours, open(self.folder / "qemu", "w+b") as said:
            with theirs:
                report = f"socket,id=report,fd={theirs.fileno()}"
                more = ("-chardev", report, "-serial", "chardev:report")
                try:
                    process = subprocess.Popen(
                        [*died_with_parent(), *self.command_line, *more],
                        env=self.guest.qemu.env(),
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=said,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                    )
                except OSError as error:
                    raise KernelError(f"{self.command_line[0]} does not start: {error}") from error
            try:
                for line in _lines(ours, begun + limit_s):
                    read_line(trial, line)
                    if trial.ended:
                        break
                trial.late = not trial.ended and time.monotonic() >= begun + limit_s
                _wait(process, ENDING_S if trial.ended else 0.5)
            finally:
                process.kill()
                process.wait()
            trial.qemu_code = process.returncode
            said.seek(0)
            trial.qemu_words = said.read().decode(errors="replace").strip()
        trial.seconds = time.monotonic() - begun
        console = self.folder / "console"
        if console.exists():
            text = console.read_text(encoding="utf-8", errors="replace").replace("\r", "")
            trial.console = "\n".join(text.rstrip().splitlines()[-15:])
        return trial


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> None:
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            return


def _lines(connection: socket.socket, deadline: float) -> Iterable[str]:
    """Lines as they come, until the other side is closed or the deadline has passed."""
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([connection], [], [], left)
        data = connection.recv(65536) if ready else b""
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")


def read_line(trial: Trial, line: str) -> None:
    """One line of the guest's report; what is none is left out."""
    kind, _, rest = line.partition(" ")
    words = rest.split()
    last = trial.functions[-1] if trial.functions else None
    try:
        if kind == "start":
            trial.release = words[0]
        elif kind == "end":
            trial.code = int(words[0])
        elif kind == "output":
            trial.output.append(rest)
        elif kind == "function":
            place, address, vendor, device, class_code, driver = words
            known = None if driver == "-" else driver
            trial.functions.append(
                SeenFunction(place, address, vendor[2:], device[2:], class_code[2:], known)
            )
        elif last is None or not words or words[0] != last.place:
            return
        elif kind == "disk":
            last.disks.append((words[1], int(words[2]) * 512, words[3]))
        elif kind == "net":
            last.interfaces.append((words[1], words[2], words[3]))
        elif kind == "register":
            last.register = (int(words[1]), int(words[2]), " ".join(words[3:]))
        elif kind == "failed":
            last.failed.append(" ".join(words[1:]))
    except (ValueError, IndexError):
        return


def find_qemu(given: str | None, *, vfio_user: bool = False) -> Qemu:
    """The QEMU that was given, this machine's own, or else the lab's. Raises Unsupported."""
    return find_newer() if vfio_user and given is None else find_here(given)


def find_busybox() -> Path:
    """A busybox that needs no libraries: this machine's, or else the lab's. Raises Unsupported.

    Nothing is fetched for it: who has one package to install is told so at once.
    """
    here = shutil.which("busybox", path=needs.search_path())
    if here is not None and _is_static(Path(here)):
        return Path(here)
    layer = packages.ready_layer()
    for found in (OF_THE_LABS_GUEST, *([layer / "usr/bin/busybox"] if layer else [])):
        if found.is_file():
            return found
    raise Unsupported(
        "the small guest needs a static busybox, which is not here",
        hint="install your distribution's busybox-static (apt-get install busybox-static); "
        "vfiotool lab demo fetches one for the lab",
    )


def _is_static(program: Path) -> bool:
    """Whether the ELF file (64 bits) has no PT_INTERP header, which names a dynamic loader."""
    data = program.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return False
    (start,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    kinds = (struct.unpack_from("<I", data, start + n * size)[0] for n in range(count))
    return _PT_INTERP not in kinds
