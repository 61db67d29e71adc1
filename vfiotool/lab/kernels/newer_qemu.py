"""QEMU 11 of Debian's next release, for what this machine's own cannot do: vfio-user devices.

It is unpacked into the cache with all of its libraries and run through the loader that came with
them, so that it runs on an older Debian without root and replaces nothing there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vfiotool.errors import Unsupported
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, verified

PACKAGES = ("qemu-system-x86", "seabios")
RELEASE = "trixie"
PROGRAM = "qemu-system-x86_64"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_NOT_KEPT = ("etc", "var", "usr/include", "usr/share/doc", "usr/share/man", "usr/share/locale")


def _folder() -> Path:
    return cache_root() / f"newer-qemu-{digest('newer qemu 1', RELEASE, *PACKAGES)}"


def newer_qemu() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Command and environment of it, fetched on first use.

    Raises Unsupported where it cannot be fetched, KernelError when a download fails or what is in
    the cache was damaged.
    """
    folder = _folder()
    if not folder.is_dir():
        if os.uname().machine != "x86_64" or not packages.is_debian():
            raise Unsupported(
                "QEMU with vfio-user is fetched on x86-64 Debian only",
                hint="install QEMU 10.1 or newer with your package manager",
            )
        with locked("newer-qemu"):
            if not folder.is_dir():
                _fetch(folder)
    verified(folder)
    libraries = folder / _LIBRARIES
    # Some libraries are in folders of their own (pulseaudio's, ceph's).
    beside = sorted({path.parent for path in libraries.glob("*/*.so*")})
    paths = ":".join(str(path) for path in (libraries, *beside))
    command = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", paths]
    command.append(str(folder / "usr/bin" / PROGRAM))
    for part in ("seabios", "qemu"):
        command += ["-L", str(folder / "usr/share" / part)]
    return tuple(command), (("QEMU_MODULE_DIR", str(libraries / "qemu")),)


def _fetch(folder: Path) -> None:
    apt = packages.Apt("newer-qemu", RELEASE, backports=True, bare=True)
    apt.update()
    files = apt.download_missing(*PACKAGES, release=f"{RELEASE}-backports")
    with filled(folder) as partial:
        # As in any merged system: packages still ship /lib.
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / "usr" / name).mkdir(parents=True)
            (partial / name).symlink_to(f"usr/{name}")
        for file in files:
            packages.unpack(file, partial)
        for name in _NOT_KEPT:
            shutil.rmtree(partial / name, ignore_errors=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / name).unlink()
    shutil.rmtree(apt.archives, ignore_errors=True)
