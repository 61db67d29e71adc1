"""A prepared kernel: a folder of the cache with `image`, `modules/` and `kernel.json`.

`image` is what QEMU loads, `modules/` what the guest finds in /lib/modules.
"""

from __future__ import annotations

import json
import lzma
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest

# Families of drivers that no lab machine has hardware for; without them a kernel is half as large.
LEFT_OUT = ("sound", "drivers/media", "drivers/net/wireless", "drivers/infiniband")


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot. `modules` is the folder for /lib/modules/<release>, if any."""

    name: str
    release: str
    image: Path
    modules: Path | None
    origin: str
    notes: tuple[str, ...] = ()


def folder(name: str) -> Path:
    return cache_root() / "kernels" / name


def load(name: str) -> Kernel | None:
    """The prepared kernel `name`, or None if it has to be prepared first."""
    place = folder(name)
    try:
        stored = json.loads((place / "kernel.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if name == "iommufd" and stored["key"] != fragment_key():
        return None
    modules = place / "modules"
    return Kernel(
        name=name,
        release=stored["release"],
        image=place / "image",
        modules=modules if modules.is_dir() else None,
        origin=stored["origin"],
        notes=tuple(stored["notes"]),
    )


def fragment_key() -> str:
    """Names the iommufd kernel's configuration; a cached kernel of another one is built again."""
    return digest((Path(__file__).parent / "kernel.fragment").read_bytes())


def store(
    place: Path, release: str, origin: str, *, notes: tuple[str, ...] = (), key: str = ""
) -> None:
    """Write the description that `load` reads."""
    stored = {"release": release, "origin": origin, "notes": notes, "key": key}
    text = json.dumps(stored, indent=1)
    (place / "kernel.json").write_text(text, encoding="utf-8")


def trim_modules(modules: Path) -> None:
    """Leave out what no lab machine uses, and unpack the rest: guests load faster so."""
    for part in LEFT_OUT:
        subprocess.run(["rm", "-rf", str(modules / "kernel" / part)], check=True)
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    for packed in modules.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()


def run_depmod(modules: Path, release: str) -> None:
    """Write modules.dep and its kin for a modules' folder that has any place and name."""
    command, environment = packages.need_tool("depmod", "kmod")
    base = modules.parent / "depmod"
    parent = base / "lib/modules"
    parent.mkdir(parents=True)
    modules.rename(parent / release)
    try:
        subprocess.run([*command, "-b", str(base), release], env=environment, check=True)
    finally:
        (parent / release).rename(modules)
        subprocess.run(["rm", "-rf", str(base)], check=True)
