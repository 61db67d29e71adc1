"""Builds vfiotool's two C extensions; named in pyproject.toml, so that no setup.py is needed.

`vfiotool._native` is cffi's API mode: its C is generated at build time from the library's headers,
compiled against them, and not committed. `vfiotool._mmio` is a type written by hand
(see `mmio_module.c`). Both keep to Python's stable ABI.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent

# What vfio/native.py sees of the library, one header a concern; a new one is named here and in
# pyproject.toml. `ioctl.h` is for the library itself, `mmio.h` for `vfiotool._mmio`.
HEADERS = (
    "handle.h",
    "vfio.h",
    "dma.h",
    "iommufd.h",
    "irq.h",
    "nvme_queue.h",
    "nvme_load.h",
    "gfx.h",
    "migration.h",
)

FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def declarations(header: str) -> str:
    """A header as cffi reads it: no comments, and of the preprocessor's lines only constants."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return re.sub(r"^#(?!define \w+ \w).*\n", "", text, flags=re.MULTILINE)


def interface() -> FFI:
    """The library as its headers declare it, ready to be emitted."""
    ffi = FFI()
    for name in HEADERS:
        ffi.cdef(declarations((HERE / name).read_text()))
    includes = "".join(f'#include "{name}"\n' for name in HEADERS)
    ffi.set_source("vfiotool._native", includes, py_limited_api=True)
    return ffi


class BuildExtensions(build_ext):
    """`build_ext` that first generates the C of `vfiotool._native`."""

    def build_extension(self, extension) -> None:  # type: ignore[no-untyped-def]
        extension.include_dirs.append(str(HERE))
        extension.extra_compile_args.extend(FLAGS)
        if extension.name == "vfiotool._native":
            generated = Path(self.build_temp) / "_native.c"
            generated.parent.mkdir(parents=True, exist_ok=True)
            interface().emit_c_code(str(generated))
            extension.sources = [*extension.sources, str(generated)]
        super().build_extension(extension)


FAULT_BUILD = HERE.parent / "build" / "fault-injection"


def build_with_fault_injection() -> Path:
    """The folder of a `vfiotool._native` for tests, any of whose calls into the kernel can be made
    to fail (`vt_fault_set`). Built only if a source is newer: it is used in guests too, where
    compiling takes minutes."""
    root = HERE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    native = next(entry for entry in settings["ext-modules"] if entry["name"] == "vfiotool._native")
    built = FAULT_BUILD / "_native.abi3.so"
    inputs = [*HERE.glob("*.[ch]"), Path(__file__), root / "pyproject.toml"]
    if built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return FAULT_BUILD
    FAULT_BUILD.mkdir(parents=True, exist_ok=True)
    generated = FAULT_BUILD / "_native.c"
    interface().emit_c_code(str(generated))
    command = ["gcc", "-O0", "-shared", "-fPIC", "-DVT_FAULT_INJECTION", *FLAGS]
    command += [f"-I{HERE}", f"-I{sysconfig.get_path('include')}", "-lpthread"]
    command += ["-o", f"{built}.new", str(generated)]
    command += [str(root / source) for source in native["sources"]]
    subprocess.run(command, check=True)
    Path(f"{built}.new").rename(built)
    return FAULT_BUILD
