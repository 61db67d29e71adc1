"""A guest inside the lab's guest: this guest's own kernel under a QEMU of its own, with TCG.

Its memory is shared (memfd), as the devices of other processes need it. What it is for is a shell
script, which is all that it runs; what the script prints comes back, and `good` as its last line
says that it came to its end.
"""

from __future__ import annotations

import lzma
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vfiotool.lab.image import Archive, loading_order

MEMORY = "192M"
# A processor emulated by an emulated one: this guest boots in about a minute.
LIMIT_S = 1200.0
_BUSYBOX = Path("/run/lab/busybox")
_CONF = Path("/run/lab/lab.conf")
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin 2>/dev/null || /bin/busybox mkdir -p /bin
export PATH=/bin
busybox mkdir -p /proc /sys /tmp
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev 2>/dev/null
for module in $(busybox seq 0 COUNT); do
    [ ! -e /modules/$module ] || busybox insmod /modules/$module
done
busybox sh -e /script.sh && echo good
busybox poweroff -f
"""


def _kernel() -> tuple[Path, Path]:
    """The image that this guest runs, as its cache has it, and the modules of it."""
    for line in _CONF.read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "MODULES":
            (folder,) = shlex.split(value) or [""]
            image = Path(folder).parent / "image"
            if folder and image.is_file():
                return image, Path("/lib/modules") / os.uname().release
    pytest.skip("the kernel of this guest is not in the lab's cache")


def _initramfs(modules: Path, names: tuple[str, ...], script: str) -> bytes:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", _BUSYBOX.read_bytes())
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
    image, found = _kernel()
    archive = folder / "nested.cpio"
    archive.write_bytes(_initramfs(found, modules, script))
    return [
        *(qemu, "-nodefaults", "-display", "none", "-no-reboot", "-smp", "1"),
        *("-accel", "tcg", "-cpu", "max,la57=off", "-m", MEMORY),
        *("-machine", "q35,memory-backend=memory"),
        *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"),
        *("-kernel", str(image), "-initrd", str(archive)),
        *("-append", "console=ttyS0 panic=-1 quiet", "-serial", "stdio"),
        *options,
    ]


def run_nested(folder: Path, modules: tuple[str, ...], script: str, *options: str) -> str:
    """What the script printed, once the guest is off; it came to its end."""
    command = nested_command(folder, modules, script, *options)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S
    )
    # A kernel says "reboot: Power down" behind it, however quiet it is to be.
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("[")]
    assert done.returncode == 0 and lines[-1:] == ["good"], (done.stdout[-2000:], done.stderr)
    return done.stdout
