"""Builds vfiotool's two C extensions; named in pyproject.toml, so that no setup.py is needed.

`vfiotool._native` is cffi's API mode: its C is generated at build time from `native.cdef.h`,
compiled against the real headers, and not committed. `vfiotool._mmio` is a type written by hand
(see `mmio_module.c`). Both keep to Python's stable ABI.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent

# One header a concern; a new one is named here and in pyproject.toml's list of sources.
HEADERS = (
    "ioctl.h",
    "vfio.h",
    "dma.h",
    "iommufd.h",
    "irq.h",
    "mmio.h",
    "nvme_queue.h",
    "nvme_load.h",
    "gfx.h",
    "migration.h",
)

# What cffi generates is not ours to make free of warnings.
PREAMBLE = '#pragma GCC diagnostic ignored "-Wextra"\n#pragma GCC diagnostic ignored "-Wall"\n'

FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def interface() -> FFI:
    """The library as `native.cdef.h` declares it, ready to be emitted."""
    ffi = FFI()
    ffi.cdef((HERE / "native.cdef.h").read_text())
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
