"""The guest's initramfs: busybox, the modules that reach the root, the scripts, the settings.

It is written anew for each boot (a few megabytes, some ten milliseconds): nothing to go stale.
"""

from __future__ import annotations

import gzip
import lzma
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vfiotool.errors import Unsupported

# A virtio IOMMU's driver first: behind one the root's own device is not probed before it is there.
BOOT_MODULES = (
    "virtio_iommu",
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
)
INSIDE = Path(__file__).parent / "inside"


def module_name(path: str) -> str:
    """`kernel/fs/9p/9p.ko.xz` -> `9p`, with the kernel's underscores."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """A module's content, unpacked: .ko, .ko.gz, .ko.xz or .ko.zst. Raises Unsupported."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if path.suffix != ".zst":
        return content
    program = shutil.which("zstd")
    if program is None:
        raise Unsupported(
            "this kernel's modules are packed with zstd, which is not here",
            hint="install your distribution's zstd",
        )
    return subprocess.run(
        [program, "-dc"], input=content, stdout=subprocess.PIPE, check=True
    ).stdout


def parse_modules_dep(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """modules.dep(5): name -> (path, the paths it needs, as listed)."""
    table = {}
    for line in text.splitlines():
        path, colon, needs = line.partition(":")
        if colon:
            table[module_name(path)] = (path, tuple(needs.split()))
    return table


def loading_order(names: Iterable[str], modules_dep: str) -> tuple[str, ...]:
    """Paths to insmod, dependencies first, each once; a name without an entry is built in."""
    table = parse_modules_dep(modules_dep)
    order: dict[str, None] = {}
    for name in names:
        if name not in table:
            continue
        path, needs = table[name]
        # depmod lists what has to be loaded first at the end of the line.
        for item in (*reversed(needs), path):
            order.setdefault(item)
    return tuple(order)


def settings_text(settings: Mapping[str, str | Sequence[str]]) -> str:
    """Shell assignments; a sequence becomes a string that `eval "set -- $X"` takes apart."""
    lines = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else shlex.join(value)
        lines.append(f"{key}={shlex.quote(text)}\n")
    return "".join(lines)


class Archive:
    """A cpio archive in the `newc` format (kernel: driver-api/early-userspace/buffer-format)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._folders: set[str] = set()
        self._inode = 0

    def _entry(self, name: str, mode: int, content: bytes, device: tuple[int, int]) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,
            0,
            1,
            0,
            len(content),
            0,
            0,
            *device,
            len(encoded),
            0,
        )
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._data += bytes(-len(self._data) % 4)
        self._data += content + bytes(-len(content) % 4)

    def folder(self, name: str) -> None:
        if name and name not in self._folders:
            self.folder(name.rpartition("/")[0])
            self._folders.add(name)
            self._entry(name, stat.S_IFDIR | 0o755, b"", (0, 0))

    def file(self, name: str, content: bytes, mode: int = 0o755) -> None:
        self.folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFREG | mode, content, (0, 0))

    def device(self, name: str, major: int, minor: int) -> None:
        self.folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        self._inode = -1
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        return bytes(self._data) + bytes(-len(self._data) % 512)


def initramfs(
    busybox: Path, modules: Path | None, settings: Mapping[str, str | Sequence[str]]
) -> bytes:
    """The archive for a guest whose kernel's modules are in `modules` (None: all built in)."""
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes())
    archive.file("init", (INSIDE / "guest-init.sh").read_bytes())
    archive.file("second.sh", (INSIDE / "guest-second.sh").read_bytes())
    archive.file("agent.py", (INSIDE / "agent.py").read_bytes())
    order: tuple[str, ...] = ()
    if modules is not None:
        text = (modules / "modules.dep").read_text(encoding="utf-8")
        order = loading_order(BOOT_MODULES, text)
        for path in order:
            archive.file(f"modules/{path}", (modules / path).read_bytes(), 0o644)
    complete = {**settings, "BOOT_MODULES": " ".join(order)}
    archive.file("lab.conf", settings_text(complete).encode(), 0o644)
    return archive.finish()


__all__ = [
    "Archive",
    "initramfs",
    "loading_order",
    "module_bytes",
    "module_name",
    "settings_text",
]
