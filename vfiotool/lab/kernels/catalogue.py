"""The kernels that a guest can boot, and how each comes to be here.

`host` is this machine's own, `6.1` and `6.12` are Debian 12's packages, `iommufd` is built (see
`build`), and a path names a kernel image. A prepared kernel is a folder in the cache with `image`
(what QEMU loads), `modules/` (what the guest finds in /lib/modules) and `kernel.json`.
"""

from __future__ import annotations

import ctypes
import json
import lzma
import os
import re
import struct
import subprocess
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from vfiotool.errors import NotFound, Unsupported
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, progress

DEFAULT = "6.12"
DEBIAN = {"6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64"}
NAMES = ("host", "6.1", "6.12", "iommufd")
_MAX_KERNEL = 1 << 28
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


@dataclass(frozen=True)
class Status:
    """What `lab kernels` says of one kernel; `get` is the command that makes it ready."""

    name: str
    summary: str
    release: str | None
    ready: bool
    get: str | None
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


def prepare(name: str, *, update: bool = False) -> Kernel:
    """The kernel `name`, fetched or built if it is not in the cache yet (or `update` is set).

    Raises NotFound for a name that is none and no file, Unsupported where this machine cannot
    fetch or build it (the hint says what is missing), KernelError when a download fails.
    """
    if name == "host":
        return _host_kernel()
    if name not in NAMES:
        return _path_kernel(Path(name))
    if not update and (ready := load(name)):
        return ready
    with locked(f"kernel-{name}"):
        if not update and (ready := load(name)):
            return ready
        if name == "iommufd":
            from vfiotool.lab.kernels import build

            build.iommufd_kernel(folder(name))
        else:
            _fetch_debian(name)
    ready = load(name)
    assert ready is not None
    return ready


def _host_kernel() -> Kernel:
    release = os.uname().release
    for image in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if os.access(image, os.R_OK):
            break
    else:
        raise Unsupported(
            f"this machine's own kernel {release} has no readable image in /boot",
            hint="take another one: vfiotool lab kernels",
        )
    return Kernel("host", release, image, _modules_of(release, None), str(image))


def _path_kernel(image: Path) -> Kernel:
    if not image.is_file():
        raise NotFound(
            f"no kernel named {image}, and no such file",
            hint="vfiotool lab kernels lists the names",
        )
    image = image.resolve()
    release = image_release(image)
    return Kernel(str(image), release, image, _modules_of(release, image), str(image))


def _modules_of(release: str, image: Path | None) -> Path | None:
    """The modules' folder beside an image (an unpacked package) or on this machine."""
    places = [Path("/lib/modules")]
    if image is not None:
        near = image.parent
        places = [near / "lib/modules", near.parent / "lib/modules", *places]
    return next((p / release for p in places if (p / release / "modules.dep").exists()), None)


def image_release(image: Path) -> str:
    """The release that a bzImage names itself (kernel: arch/x86/boot.rst, `kernel_version`)."""
    with open(image, "rb") as handle:
        head = handle.read(0x10000)
    if head[0x202:0x206] != b"HdrS":
        raise Unsupported(
            f"{image} is no bzImage", hint="give the file that /boot holds as vmlinuz-…"
        )
    start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
    return head[start : head.index(b"\0", start)].split()[0].decode()


def uncompressed(image: bytes) -> bytes | None:
    """The ELF file inside a bzImage, None where its compression is unknown here.

    QEMU boots it directly through the PVH entry, which saves the guest from decompressing itself:
    under TCG that takes seconds (kernel: arch/x86/boot.rst, `payload_offset`).
    """
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The kernel's build appends the size (scripts/Makefile.lib, size_append).
        return _unzstd(payload, int.from_bytes(payload[-4:], "little"))
    return None


def _unzstd(data: bytes, size: int) -> bytes | None:
    """The first frame of `data`, None without libzstd (which dpkg needs, so Debian has it).

    Python's own decompressor came with 3.14. Calls as in zstd.h, all of them stable.
    """
    try:
        zstd = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    pointer, length = ctypes.c_char_p, ctypes.c_size_t
    zstd.ZSTD_findFrameCompressedSize.argtypes = [pointer, length]
    zstd.ZSTD_findFrameCompressedSize.restype = length
    zstd.ZSTD_decompress.argtypes = [pointer, length, pointer, length]
    zstd.ZSTD_decompress.restype = length
    zstd.ZSTD_isError.argtypes = [length]
    frame = zstd.ZSTD_findFrameCompressedSize(data, len(data))
    if zstd.ZSTD_isError(frame) or size > _MAX_KERNEL:
        return None
    room = ctypes.create_string_buffer(size)
    written = zstd.ZSTD_decompress(room, size, data, frame)
    return room.raw[:written] if written == size else None


def _fetch_debian(name: str) -> None:
    if not packages.is_debian():
        raise Unsupported(
            f"fetching Debian's kernel {name} needs Debian's apt and archive keys",
            hint="give a kernel image instead: vfiotool lab run --kernel PATH -- COMMAND",
        )
    apt = packages.Apt("kernels", "bookworm")
    apt.update()
    depends = apt.depends(DEBIAN[name])
    found = re.search(r"linux-image-(\S+)", depends)
    assert found is not None
    release = found.group(1)
    with filled(folder(name)) as partial:
        [package] = apt.download(f"linux-image-{release}", into=partial)
        progress(f"unpacking {package.name}")
        packages.unpack(package, partial / "package")
        image = (partial / f"package/boot/vmlinuz-{release}").read_bytes()
        (partial / "image").write_bytes(uncompressed(image) or image)
        (partial / f"package/lib/modules/{release}").rename(partial / "modules")
        origin = package.name.removesuffix(".deb").replace("%3a", ":")
        package.unlink()
        subprocess.run(["rm", "-rf", str(partial / "package")], check=True)
        trim_modules(partial / "modules")
        notes = _add_samples(apt, name, release, partial / "modules")
        run_depmod(partial / "modules", release)
        store(partial, release, origin, notes=notes)


def _add_samples(apt: packages.Apt, name: str, release: str, modules: Path) -> tuple[str, ...]:
    from vfiotool.lab.kernels import build

    try:
        build.mdev_samples(apt, name, release, modules / "extra")
    except Unsupported as error:
        return (f"no mdev samples: {error.message}; {error.hint}",)
    return ()


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


def statuses() -> list[Status]:
    """What is here and what is missing, for each kernel that has a name."""
    rows = []
    for name in NAMES:
        if name == "host":
            rows.append(_host_status())
            continue
        ready = load(name)
        summary = (
            "iommufd, VFIO character devices, vDPA simulators; built from linux-source-6.12"
            if name == "iommufd"
            else f"Debian 12's {DEBIAN[name]}"
        )
        rows.append(
            Status(
                name,
                summary,
                ready.release if ready else None,
                ready is not None,
                None if ready else f"vfiotool lab kernels --get {name}",
                ready.notes if ready else (),
            )
        )
    return rows


def _host_status() -> Status:
    release = os.uname().release
    try:
        kernel = _host_kernel()
    except Unsupported as error:
        return Status("host", error.message, release, False, None)
    notes = () if kernel.modules else ("without modules: all that a guest needs must be built in",)
    return Status("host", f"this machine's own, {kernel.image}", release, True, None, notes)


def as_json(status: Status) -> dict[str, object]:
    return asdict(status)
