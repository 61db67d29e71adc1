"""Guests inside the lab's guest, under a QEMU of their own, with TCG.

Their kernel is the lab's own small one where it was built, which comes up in a fraction of the time
that a distribution's takes there; this guest's own otherwise. Their memory is shared (memfd), as
the devices of other processes need it. What such a guest is for is a shell script, which is all
that it runs; what the script prints comes back, and `good` as its last line says that it came to
its end.
"""

from __future__ import annotations

import lzma
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from vfiotool.lab.image import Archive, loading_order

# A distribution's kernel is 60 MB by itself.
MEMORY, MEMORY_OF_THE_SMALL_ONE = "192M", "128M"
# A processor emulated by an emulated one: minutes, where little else runs.
LIMIT_S = 1200.0
SMALL = "iommufd"
ARGUMENTS = (
    "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check tsc=reliable audit=0 "
    "rcupdate.rcu_expedited=1 random.trust_cpu=on 8250.nr_uarts=1 nowatchdog"
)
# The clock goes by what was executed: an emulated processor of an emulated one takes longer for a
# timer's tick than real time leaves until the next one, and would do nothing else.
CLOCK = ("-icount", "shift=3,sleep=on")
_BUSYBOX = Path("/run/lab/busybox")
_CONF = Path("/run/lab/lab.conf")
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin 2>/dev/null || /bin/busybox mkdir -p /bin
export PATH=/bin
busybox mkdir -p /proc /sys /tmp
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev 2>/dev/null
echo up
for module in $(busybox seq 0 COUNT); do
    [ ! -e /modules/$module ] || busybox insmod /modules/$module
done
busybox sh -e /script.sh && echo good
busybox poweroff -f
"""


def _kernel() -> tuple[Path, Path | None, str]:
    """An image in the lab's cache, the folder of its modules if it has any, and the memory that a
    guest with it needs."""
    for line in _CONF.read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "MODULES":
            (folder,) = shlex.split(value) or [""]
            image = Path(folder).parent / "image"
            if not folder or not image.is_file():
                break
            small = image.parents[1] / SMALL / "image"
            if small.is_file():
                # All that is asked for here is built into it.
                return small, None, MEMORY_OF_THE_SMALL_ONE
            return image, Path("/lib/modules") / os.uname().release, MEMORY
    pytest.skip("the kernel of this guest is not in the lab's cache")


def _initramfs(modules: Path | None, names: tuple[str, ...], script: str) -> bytes:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", _BUSYBOX.read_bytes())
    order: tuple[str, ...] = ()
    if modules is not None:
        order = loading_order(names, (modules / "modules.dep").read_text())
        for number, path in enumerate(order):
            content = (modules / path).read_bytes()
            if path.endswith(".xz"):
                content = lzma.decompress(content)
            archive.file(f"modules/{number}", content, 0o644)
    archive.file("init", _INIT.replace("COUNT", str(len(order))).encode())
    archive.file("script.sh", script.encode())
    return archive.finish()


def nested_command(folder: Path, modules: tuple[str, ...], script: str, *options: str) -> list[str]:
    """QEMU's command line for a guest that loads `modules`, runs `script` and is switched off.
    Skips where there is no QEMU in this guest."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 in the guest's PATH")
    image, found, memory = _kernel()
    archive = folder / "nested.cpio"
    archive.write_bytes(_initramfs(found, modules, script))
    return [
        *(qemu, "-nodefaults", "-display", "none", "-no-reboot", "-smp", "1"),
        *("-accel", "tcg", "-cpu", "max,la57=off", "-m", memory, *CLOCK),
        *("-machine", "q35,memory-backend=memory,sata=off,smbus=off,usb=off"),
        *("-object", f"memory-backend-memfd,id=memory,size={memory},share=on"),
        *("-kernel", str(image), "-initrd", str(archive)),
        *("-append", ARGUMENTS, "-serial", "stdio"),
        *options,
    ]


class Nested:
    """A guest that is started, listened to and spoken to, and ends with `stack`; each of its lines
    goes to `report` as well."""

    def __init__(
        self, name: str, command: list[str], stack: ExitStack, report: Callable[[str], None]
    ) -> None:
        self.name = name
        self.said: list[str] = []
        self.report = report
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        self.listener = threading.Thread(target=self._listen, args=(self.process.stdout,))
        self.listener.start()

    def _listen(self, output: IO[str]) -> None:
        for line in iter(output.readline, ""):
            if line.strip():
                self.said.append(line.strip())
                self.report(f"{self.name}: {line.strip()}")
        self.report(f"{self.name} is off")

    def until(self, line: str, ends: float) -> None:
        while line not in self.said:
            assert time.monotonic() < ends, (self.name, self.said[-20:])
            self.listener.join(0.1)
            assert self.listener.is_alive() or line in self.said, (self.name, self.said[-20:])

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()


class Progress:
    """What happened when: printed, and on this guest's console at once, where it can be followed
    while the test runs."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, what: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f} s  {what}"
        print(line)
        Path("/dev/console").write_text(f"{line}\r\n")


def run_nested(folder: Path, modules: tuple[str, ...], script: str, *options: str) -> str:
    """What the script printed, once the guest is off; it came to its end."""
    command = nested_command(folder, modules, script, *options)
    with ExitStack() as stack:
        guest = Nested("nested", command, stack, Progress())
        guest.until("good", time.monotonic() + LIMIT_S)
        guest.listener.join(LIMIT_S)
        assert guest.process.wait(LIMIT_S) == 0
    # A kernel says "reboot: Power down" behind it, however quiet it is to be, and QEMU that a VDUSE
    # device, which cannot be suspended, does not tell where its rings are.
    lines = [line for line in guest.said if not line.startswith(("[", "qemu-system"))]
    assert lines[-1:] == ["good"], guest.said[-20:]
    return "\n".join(guest.said)
