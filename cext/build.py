"""Builds vfiotool's two C extensions; named in pyproject.toml, so that no setup.py is needed.

`vfiotool.native._library` is cffi's API mode: its C is generated at build time from the
library's headers, compiled against them, and not committed. `vfiotool.native._types` is written
by hand (see `python/types_module.c`). Both keep to Python's stable ABI.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent

# What native/library.py sees of the library, one header a concern; a new one is named here and in
# pyproject.toml. `ioctl.h` is for the library itself, `mmio.h` for `vfiotool.native._types`.
HEADERS = (
    "vfio/handle.h",
    "vfio/vfio.h",
    "vfio/dma.h",
    "vfio/iommufd.h",
    "vfio/irq.h",
    "nvme/nvme_queue.h",
    "nvme/nvme_load.h",
    "vfio/gfx.h",
    "vfio/migration.h",
    "virtio/memory.h",
    "virtio/ring.h",
    "virtio/inflight.h",
    "virtio/packed_log.h",
    "virtio/dirty.h",
    "virtio/io.h",
    "virtio/port.h",
    "virtio/block.h",
    "virtio/limits.h",
    "virtio/worker.h",
    "virtio/signal.h",
    "virtio/direct.h",
)
# Of the C library's own headers, as far as ours mention it.
FOREIGN = "struct iovec { ...; };"

FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
# What finds a mistake at run time at next to no cost; distributions build with the same. Level 2
# and not 3, which older compilers do not know.
HARDENING = ["-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
LINKING = ["-Wl,-z,relro", "-Wl,-z,now"]


def declarations(header: str) -> str:
    """A header as cffi reads it: no comments, and of the preprocessor's lines only constants."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return re.sub(r"^#(?!define \w+ \w).*\n", "", text, flags=re.MULTILINE)


def interface() -> FFI:
    """The library as its headers declare it, ready to be emitted."""
    ffi = FFI()
    ffi.cdef(FOREIGN)
    for name in HEADERS:
        ffi.cdef(declarations((HERE / name).read_text()))
    includes = "".join(f'#include "{name}"\n' for name in HEADERS)
    ffi.set_source("vfiotool.native._library", includes, py_limited_api=True)
    return ffi


class BuildExtensions(build_ext):
    """`build_ext` that first generates the C of `vfiotool.native._library`."""

    def build_extension(self, extension) -> None:  # type: ignore[no-untyped-def]
        extension.include_dirs.append(str(HERE))
        extension.extra_compile_args.extend([*FLAGS, *HARDENING])
        extension.extra_link_args.extend(LINKING)
        if extension.name == "vfiotool.native._library":
            generated = Path(self.build_temp) / "_library.c"
            generated.parent.mkdir(parents=True, exist_ok=True)
            interface().emit_c_code(str(generated))
            extension.sources = [*extension.sources, str(generated)]
        super().build_extension(extension)


BUILT = HERE.parent / "build"
FAULT_BUILD = BUILT / "fault-injection"
SANITIZED_BUILD = BUILT / "sanitized"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time builds for tests; the others wait, and find it done."""
    BUILT.mkdir(exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_current(built: Path) -> bool:
    inputs = [*HERE.rglob("*.[ch]"), Path(__file__), HERE.parent / "pyproject.toml"]
    return built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in inputs)


def _compile(name: str, folder: Path, flags: list[str], *, apart: tuple[str, ...] = ()) -> None:
    """`folder`/NAME.abi3.so: the extension vfiotool.native.NAME as pyproject.toml has it,
    with `flags` of its own and without the sources `apart`. Built only if a source is newer."""
    built = folder / f"{name}.abi3.so"
    if _is_current(built):
        return
    root = HERE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = next(x for x in settings["ext-modules"] if x["name"] == f"vfiotool.native.{name}")
    sources = [root / source for source in found["sources"] if source not in apart]
    folder.mkdir(parents=True, exist_ok=True)
    if name == "_library":
        sources.append(folder / "_library.c")
        interface().emit_c_code(str(sources[-1]))
    _link(built, sources, flags)


def _link(built: Path, sources: list[Path], flags: list[str]) -> None:
    command = ["gcc", "-shared", "-fPIC", *FLAGS]
    command += [f"-I{HERE}", f"-I{sysconfig.get_path('include')}"]
    command += ["-o", f"{built}.new", *map(str, sources), *flags, "-lpthread"]
    subprocess.run(command, check=True)
    Path(f"{built}.new").rename(built)


def build_with_fault_injection() -> Path:
    """The folder of both extensions for tests, any of whose calls into the kernel can be made to
    fail (`vt_fault_set`). It is used in guests too, where compiling takes minutes."""
    # The way into the kernel is a library of its own here, so that one count serves both.
    way = FAULT_BUILD / "libvt_ioctl.so"
    names = ("_library", "_types")
    if all(_is_current(x) for x in (way, *(FAULT_BUILD / f"{name}.abi3.so" for name in names))):
        return FAULT_BUILD  # as in a guest, whose tree cannot be written to
    flags = ["-O0", "-DVT_FAULT_INJECTION"]
    with _alone():
        if not _is_current(way):
            FAULT_BUILD.mkdir(parents=True, exist_ok=True)
            _link(way, [HERE / "vfio" / "ioctl.c"], [*flags, "-fvisibility=default"])
        flags += [f"-L{FAULT_BUILD}", "-lvt_ioctl", "-Wl,-rpath,$ORIGIN"]
        for name in names:
            _compile(name, FAULT_BUILD, flags, apart=("cext/vfio/ioctl.c",))
    return FAULT_BUILD


def build_with_sanitizers() -> Path:
    """The folder of a package `vfiotool` for tests, whose C parts run under the address and the
    undefined behaviour sanitizer; its Python is this folder's, by links."""
    package = SANITIZED_BUILD / "vfiotool"
    with _alone():
        for name in ("_library", "_types"):
            _compile(name, package / "native", SANITIZERS)
        for folder in (Path("vfiotool"), Path("vfiotool", "native")):
            for entry in (HERE.parent / folder).iterdir():
                link = SANITIZED_BUILD / folder / entry.name
                if entry.suffix != ".so" and entry.name != "__pycache__" and not link.exists():
                    link.symlink_to(entry)
    return SANITIZED_BUILD
