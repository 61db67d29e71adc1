"""A libvirtd of Debian's, unpacked on this machine for tests in guests, which have no network.

python -m tests.oracles.libvirtd     fetches it: a guest sees this machine's cache
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from tests.oracles.fetched import fetch
from vfiotool.lab.kernels import packages

PACKAGES = ["libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients"]
_DRIVERS = "usr/lib/x86_64-linux-gnu/libvirt/connection-driver"


def folder() -> Path:
    """Where it is or would be; root's cache, in a guest too, whose own HOME is another."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    return home / ".cache" / "vfiotool" / "oracles" / "libvirtd"


def is_here() -> bool:
    return (folder() / _DRIVERS / "libvirt_driver_qemu.so").exists()


def get() -> None:
    """Fetch it. Raises OSError off Debian, KernelError."""
    codename = packages.os_release().get("VERSION_CODENAME", "bookworm")
    wanted = folder() / _DRIVERS / "libvirt_driver_qemu.so"
    fetch(codename, PACKAGES, wanted, folder(), dependencies=True)


def environment() -> dict[str, str]:
    """What its programs are started with."""
    place = folder()
    return {
        **os.environ,
        # Some packages still ship /lib.
        "LD_LIBRARY_PATH": f"{packages.library_path(place)}:{place}/lib/x86_64-linux-gnu",
        "LIBVIRT_DRIVER_DIR": str(place / _DRIVERS),
        "PATH": f"{place}/usr/sbin:{place}/usr/bin:{os.environ['PATH']}",
    }


if __name__ == "__main__":
    get()
