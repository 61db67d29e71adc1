"""The programs that served disks are compared with: QEMU's storage tools and blkio's.

They are of Debian 13, fetched into the lab's cache by apt folders of one's own and run through the
loader that came with them, so that any Debian will do. Nothing is installed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import Unsupported, VfiotoolError
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, verified

PACKAGES = ("qemu-utils", "qemu-block-extra", "libblkio-dev")
BLKIO = ("blkio-bench", "blkio-copy")
# Of networks: testpmd, which drives virtio-user ports, and iperf3.
NET_PACKAGES = ("dpdk-dev", "iperf3")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Peers:
    """An unpacked folder of programs."""

    folder: Path

    def command(self, program: str) -> list[str]:
        """How to start `program`: qemu-storage-daemon, qemu-io, qemu-img, blkio-bench or -copy; or
        dpdk-testpmd or iperf3, of `find_net`."""
        libraries = self.folder / _LIBRARIES
        paths = ":".join(str(path) for path in (libraries, *_folders_beside(libraries)))
        loader = libraries / "ld-linux-x86-64.so.2"
        place = self.folder / "usr/bin" / program
        return [str(loader), "--library-path", paths, str(place)]

    def env(self) -> dict[str, str]:
        modules = self.folder / _LIBRARIES / "qemu"
        return {**os.environ, "QEMU_MODULE_DIR": str(modules)}


def _folders_beside(libraries: Path) -> list[Path]:
    """Libraries that Debian keeps in folders of their own."""
    return [path for name in ("ceph", "libblkio") if (path := libraries / name).is_dir()]


def _folder() -> Path:
    return cache_root() / f"peers-{digest('peers 1', *PACKAGES, *BLKIO)}"


def drivers(found: Peers, *names: str) -> list[str]:
    """testpmd's options that load these drivers of DPDK, such as net_virtio."""
    options = []
    for name in names:
        [library] = (found.folder / _LIBRARIES).glob(f"dpdk/pmds-*/librte_{name}.so")
        options += ["-d", str(library)]
    return options


def is_here() -> bool:
    """Whether they were fetched already."""
    return _folder().is_dir()


@functools.cache
def find() -> Peers | str:
    """The peers of disks, fetched on first use, or why they cannot be had here."""
    return _find(_folder(), PACKAGES, "trixie-backports", BLKIO)


@functools.cache
def find_net() -> Peers | str:
    """The peers of networks, likewise."""
    folder = cache_root() / f"net-peers-{digest('net peers 1', *NET_PACKAGES)}"
    return _find(folder, NET_PACKAGES, "trixie", ())


def _find(
    folder: Path, wanted: tuple[str, ...], release: str, examples: tuple[str, ...]
) -> Peers | str:
    try:
        if not folder.is_dir():
            _check_machine()
            with locked("peers"):
                if not folder.is_dir():
                    _fetch(folder, wanted, release, examples)
        return Peers(verified(folder))
    except VfiotoolError as error:
        return f"the peers cannot be had: {error.message}"


def _check_machine() -> None:
    if os.uname().machine != "x86_64" or not packages.is_debian():
        raise Unsupported("they are fetched on x86-64 Debian only")
    if shutil.which("gcc") is None:
        raise Unsupported("no gcc")


def _fetch(folder: Path, wanted: tuple[str, ...], release: str, examples: tuple[str, ...]) -> None:
    apt = packages.Apt("peers", "trixie", backports=True, bare=True)
    apt.update()
    files = apt.download_missing(*wanted, release=release)
    with filled(folder) as partial:
        # As in any merged system: packages still ship /lib.
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / "usr" / name).mkdir(parents=True)
            (partial / name).symlink_to(f"usr/{name}")
        for file in files:
            packages.unpack(file, partial)
        for program in examples:
            _compile(partial, program)
        # Only programs and libraries are kept.
        for name in ("etc", "var", "usr/share", "usr/include"):
            shutil.rmtree(partial / name, ignore_errors=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / name).unlink()
    shutil.rmtree(apt.archives, ignore_errors=True)


def _compile(folder: Path, program: str) -> None:
    [source] = folder.glob(f"usr/share/doc/libblkio*/examples/{program}.c*")
    if source.suffix == ".gz":
        subprocess.run(["gunzip", str(source)], check=True)
        source = source.with_suffix("")
    libraries = folder / _LIBRARIES
    command = ["gcc", "-O2", "-D_GNU_SOURCE", f"-I{folder}/usr/include", str(source)]
    command += ["-o", str(folder / "usr/bin" / program), str(libraries / "libblkio.so")]
    # What the library itself needs is of the release that it came with.
    command += ["-Wl,--unresolved-symbols=ignore-in-shared-libs", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unsupported(f"{program} does not compile: {done.stderr.strip()[-300:]}")
