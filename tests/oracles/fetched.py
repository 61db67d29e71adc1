"""Debian packages unpacked for a test to compare with; nothing is installed."""

from __future__ import annotations

from pathlib import Path

from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import locked


def fetch(suite: str, names: list[str], wanted: Path, folder: Path, *, dependencies: bool) -> None:
    """Unpack packages of a suite into `folder`, unless `wanted` is there by now.

    Tests that run side by side fetch once. Raises OSError off Debian, KernelError.
    """
    if not packages.is_debian():
        raise OSError("this is not Debian")
    with locked(f"oracle-{suite}"):
        if wanted.exists():
            return
        apt = packages.Apt(f"oracle-{suite}", suite)
        apt.sources = apt.sources[:1]
        apt.update()
        store = folder.with_suffix(".packages")
        if dependencies:
            found = apt.download_missing(*names)
        else:
            found = apt.download(*names, into=store) or sorted(store.glob("*.deb"))
        for package in found:
            packages.unpack(package, folder)
