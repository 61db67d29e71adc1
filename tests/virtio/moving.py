"""A running guest that is moved between QEMUs, whose disk is served by one process or by two.

The guest is moving_guest.c alone, on a kernel of the lab: a guest that mounts this machine's files
cannot be moved. QEMU is the lab's newer one, for `inflight-migration`.
"""

from __future__ import annotations

import lzma
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfiotool.errors import KernelError
from vfiotool.lab.image import Archive, loading_order
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.kernels.newer_qemu import newer_qemu
from vfiotool.lab.qmp import Qmp

KERNEL = "6.12"
LIMIT_S = 120.0
_MEMORY = "192M"
_MODULES = ("virtio_pci", "virtio_blk")
_SOURCE = Path(__file__).with_name("moving_guest.c")


def initramfs(folder: Path) -> Path:
    """The guest's program and the modules that reach its disk."""
    program = folder / "init"
    command = ["gcc", "-O2", "-static", "-o", str(program), str(_SOURCE)]
    subprocess.run(command, check=True)
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("init", program.read_bytes())
    modules = kernels.prepare(KERNEL).modules
    assert modules is not None
    dependencies = (modules / "modules.dep").read_text(encoding="utf-8")
    for number, path in enumerate(loading_order(_MODULES, dependencies)):
        content = (modules / path).read_bytes()
        if path.endswith(".xz"):
            content = lzma.decompress(content)
        archive.file(f"modules/{number}", content, 0o644)
    image = folder / "initramfs"
    image.write_bytes(archive.finish())
    return image


def wait_until(holds: Callable[[], Any], limit_s: float, what: str) -> Any:
    """What `holds` gives once it gives something."""
    end, pause = time.monotonic() + limit_s, threading.Event()
    while not (found := holds()):
        assert time.monotonic() < end, what
        pause.wait(0.05)
    return found


@dataclass
class Machine:
    """One QEMU, with the guest or waiting for it."""

    folder: Path
    name: str
    process: subprocess.Popen[bytes]
    qmp: Qmp = field(init=False)
    serial: socket.socket = field(init=False)
    text: str = ""

    def __post_init__(self) -> None:
        self.qmp = Qmp(self._connected("qmp"))
        self.serial = self._connected("serial")
        self.serial.setblocking(False)

    def _connected(self, what: str) -> socket.socket:
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(20)

        def connect() -> bool:
            assert self.process.poll() is None, f"QEMU ended with {self.process.returncode}"
            with suppress(OSError):
                found.connect(str(self.folder / f"{self.name}.{what}"))
                return True
            return False

        wait_until(connect, 20, f"QEMU does not listen for {what}")
        return found

    def close(self) -> None:
        self.serial.close()
        self.qmp.close()

    def said(self) -> list[str]:
        """The lines of its serial line, while the guest was here."""
        with suppress(BlockingIOError):
            while data := self.serial.recv(65536):
                self.text += data.decode(errors="replace")
        return [line.strip() for line in self.text.split("\n")[:-1]]

    def turns(self) -> int:
        """What the guest has done, by its last word here."""
        self._check_words()
        told = [line for line in self.said() if line.startswith("turns ")]
        return int(told[-1].split()[1]) if told else 0

    def _check_words(self) -> None:
        for line in self.said():
            if line.startswith("bad") or "Kernel panic" in line or "I/O error" in line:
                raise AssertionError(line)

    def ask_for_the_end(self, limit_s: float) -> None:
        """Have the guest check everything. Raises AssertionError for what it finds wrong."""
        self.serial.sendall(b"q\n")

        def is_good() -> bool:
            self._check_words()
            return "good" in self.said()

        wait_until(is_good, limit_s, "the guest does not come to its end")

    def move_to(self, other: Machine) -> dict[str, Any]:
        """Move the guest; returns what QEMU says of it."""
        place = {"uri": f"unix:{other.folder}/{other.name}.move"}
        other.qmp.command("migrate-incoming", place)
        self.qmp.command("migrate", place)

        def state() -> dict[str, Any] | None:
            told: dict[str, Any] = self.qmp.command("query-migrate")
            if told.get("status") in ("failed", "cancelled"):
                raise KernelError(f"the migration failed: {told}")
            return told if told.get("status") == "completed" else None

        told: dict[str, Any] = wait_until(state, LIMIT_S, "the migration does not end")
        wait_until(
            lambda: other.qmp.command("query-status")["status"] == "running",
            LIMIT_S,
            "the guest does not run where it went",
        )
        return told


@contextmanager
def machine(
    folder: Path, name: str, disk: Path, *, incoming: bool, in_flight: bool, packed: bool
) -> Any:
    """A QEMU whose guest has the disk behind a socket."""
    kernel = kernels.prepare(KERNEL)
    command, environment = newer_qemu()
    device = "vhost-user-blk-pci,chardev=blk,num-queues=1"
    device += ",inflight-migration=on" * in_flight + ",packed=on" * packed
    serial = f"socket,id=tty,path={folder}/{name}.serial,server=on,wait=off"
    line = "console=ttyS0 panic=-1 quiet"
    arguments = [
        *("-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "max", "-smp", "1"),
        *("-machine", "q35,memory-backend=memory", "-m", _MEMORY),
        *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"),
        *("-kernel", str(kernel.image), "-initrd", str(folder / "initramfs"), "-append", line),
        *("-chardev", f"{serial}", "-serial", "chardev:tty"),
        *("-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"),
        *("-chardev", f"socket,id=blk,path={disk}", "-device", device),
    ]
    if incoming:
        arguments += ["-incoming", "defer"]
    for kind in ("serial", "qmp", "move"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
    process = subprocess.Popen([*command, *arguments], env=_environment(environment))
    guest = None
    try:
        guest = Machine(folder, name, process)
        yield guest
    finally:
        process.kill()
        process.wait()
        if guest is not None:
            guest.close()


def _environment(more: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {**os.environ, **dict(more)}


@contextmanager
def served(command: list[str], socket_path: Path) -> Any:
    """A server process, once it listens."""
    process = subprocess.Popen(command)
    try:

        def listens() -> bool:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            return socket_path.exists()

        wait_until(listens, 30, "the server does not listen")
        yield process
    finally:
        process.terminate()
        try:
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def there_and_back(
    folder: Path,
    sockets: tuple[Path, Path],
    *,
    in_flight: bool = False,
    packed: bool = False,
    limit_s: float = LIMIT_S,
) -> list[dict[str, Any]]:
    """Boot a guest on the first disk, move it to a QEMU on the second and back, and have it check
    all that it wrote and read. Returns what QEMU says of each move."""
    first, second = sockets
    told = []
    options = {"in_flight": in_flight, "packed": packed}
    with ExitStack() as stack:
        here = machine(folder, "first", first, incoming=False, **options)
        guest: Machine = stack.enter_context(here)
        wait_until(lambda: guest.turns() > 50, LIMIT_S, "the guest does no work")
        for number, disk in enumerate((second, first)):
            there = machine(folder, f"stop{number}", disk, incoming=True, **options)
            other: Machine = stack.enter_context(there)
            before = guest.turns()
            told.append(guest.move_to(other))
            wait_until(
                lambda other=other, before=before: other.turns() > before + 50,
                limit_s,
                "the guest does no work where it went",
            )
            guest.process.kill()
            guest = other
        guest.ask_for_the_end(limit_s)
    return told
